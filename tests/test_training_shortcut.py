"""A step like the one before it takes a short way, and nothing that changes goes unnoticed there."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_layers import Net
from test_shortcut import CHANGES as OF_EVALUATION
from torch import Tensor, nn
from wild import Flat, error, randomise

import mbv2_kernels as mbv2
from mbv2_kernels import set_backend, training_forward

X = (3, 8, 9, 7)


@pytest.fixture(autouse=True)
def _automatic_backend() -> Iterator[None]:
    yield
    set_backend("auto")


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of what runs whenever a step asks all its questions."""
    found: list[str] = []
    for name in ("train_block", "train_layer"):
        original = getattr(training_forward, name)
        counted = lambda *args, name=name, original=original: (found.append(name), original(*args))[1]  # noqa: E731
        monkeypatch.setattr(training_forward, name, counted)
    return found


def trained(module: nn.Module, x: Tensor | None = None) -> Any:
    """Fused, and trained as often as it takes."""
    module = mbv2.fuse(randomise(module)).train()
    settle(module, x)
    return module


def settle(module: nn.Module, x: Tensor | None = None) -> None:
    for _ in range(3):
        module(torch.randn(X) if x is None else x).square().sum().backward()


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, all gradients there are, and all buffers afterwards."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=x.dtype).sin().view(y.shape))
    assert x.grad is not None
    return [
        y.detach(),
        x.grad,
        *(p.grad for p in module.parameters() if p.grad is not None),
        *(b.double() for b in module.buffers()),
    ]


def check_step(module: nn.Module, x: Tensor | None = None) -> None:
    """It computes what the unfused module does from the same state."""
    x = torch.randn(X) if x is None else x
    expected = step(mbv2.unfuse(copy.deepcopy(module)).double(), x.double())
    found = step(module, x)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and float((one - other).norm()) < 2e-5 * (1 + float(other.norm()))


@pytest.mark.parametrize(("make", "shape"), [(lambda: Flat(8, 48, 8), X), (Net, (3, 3, 20, 16))], ids=["block", "net"])
def test_a_third_step_asks_no_more(make: Callable[[], nn.Module], shape: tuple[int, ...], long_ways: list[str]) -> None:
    x = torch.randn(shape)
    module = trained(make(), x)
    versions = [buffer._version for buffer in module.buffers()]
    assert long_ways
    del long_ways[:]
    for _ in range(3):
        check_step(module, torch.randn(shape))
    assert not long_ways
    # what eval mode keeps of them, and autograd, is told
    assert all(now._version > before for now, before in zip(module.buffers(), versions, strict=True))
    module.eval()
    assert error(module(x), mbv2.unfuse(copy.deepcopy(module)).double()(x.double())) < 4e-6
    module.train()
    check_step(module, x)


CHANGES: dict[str, Callable[[Any], object]] = {
    "momentum": lambda b: setattr(b.conv[1], "momentum", 0.7),
    "cumulative average": lambda b: setattr(b.conv[4], "momentum", None),
    "eps": lambda b: setattr(b.conv[7], "eps", 2.0),
    "frozen norm": lambda b: b.conv[4].eval(),
    "statistics of a frozen norm": lambda b: (b.conv[4].eval(), settle(b), b.conv[4].running_var.mul_(4)),
    "no running statistics": lambda b: setattr(b.conv[1], "track_running_stats", False),
    "in place": lambda b: b.conv[3].weight.data.mul_(2),
    "data": lambda b: setattr(b.conv[0].weight, "data", b.conv[0].weight.data * 2),
    "replaced": lambda b: setattr(b.conv[6], "weight", nn.Parameter(2 * b.conv[6].weight.detach())),
    "strides": lambda b: b.to(memory_format=torch.channels_last),
    "bias": lambda b: setattr(b.conv[0], "bias", nn.Parameter(torch.ones(48))),
    "other buffers": lambda b: setattr(b.conv[1], "running_mean", b.conv[1].running_mean + 1),
    "state dict": lambda b: b.load_state_dict(randomise(Flat(8, 48, 8), seed=5).state_dict()),
    "frozen weight": lambda b: b.conv[3].weight.requires_grad_(False),
    **{name: OF_EVALUATION[name] for name in ("geometry", "activation", "layer", "hook", "forward", "flag")},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_noticed_at_once(change: Callable[[Any], object]) -> None:
    block, x = trained(Flat(8, 48, 8)), torch.randn(X)
    change(block)
    check_step(block, x)
    settle(block)
    check_step(block, x)


def test_one_value_a_channel_still_raises(long_ways: list[str]) -> None:
    block = trained(Flat(8, 48, 12, stride=2))
    del long_ways[:]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 8, 2, 2))
    check_step(block, torch.randn(1, 8, 9, 7))
    assert len(long_ways) == 2
    check_step(block, torch.randn(5, 8, 12, 10))
    assert len(long_ways) == 2


def test_without_gradients_the_statistics_move_alike(long_ways: list[str]) -> None:
    block, x = trained(Flat(8, 48, 8)), torch.randn(X)
    del long_ways[:]
    plain = mbv2.unfuse(copy.deepcopy(block)).double()
    with torch.no_grad():
        y, expected = block(x), plain(x.double())
    assert not long_ways and not y.requires_grad and error(y, expected) < 4e-6
    for one, other in zip(block.buffers(), plain.buffers(), strict=True):
        assert error(one, other) < 4e-6


def test_modes_and_backends_go_the_long_way(long_ways: list[str]) -> None:
    block, x = trained(Flat(8, 48, 12)), torch.randn(X)
    del long_ways[:]
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.bfloat16
    assert len(long_ways) == 1
    assert block(x.bfloat16().float()).dtype == torch.float32
    assert len(long_ways) == 1
    set_backend("reference")
    check_step(block)
    assert len(long_ways) == 2
    (row,) = mbv2.summary(block)
    assert row.backend == "reference"


@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16])
def test_bfloat16(norms: torch.dtype, long_ways: list[str]) -> None:
    """Running statistics in 16 bits are no usual ones."""
    block, x = trained(Flat(8, 48, 8)), torch.randn(X)
    block.to(torch.bfloat16)
    for at in (1, 4, 7):
        block.conv[at].to(norms)
    settle(block, x.bfloat16())
    del long_ways[:]
    y = block(x.bfloat16())
    assert len(long_ways) == (norms is torch.bfloat16) and y.dtype == torch.bfloat16
    block.float()
    check_step(block, x)


def test_copies_get_their_own() -> None:
    block = trained(Flat(8, 48, 8))
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        settle(twin)
        check_step(twin)
        check_step(block)


def test_a_block_is_freed_with_its_short_way() -> None:
    block = trained(Flat(8, 48, 8))
    modules = [weakref.ref(module) for module in block.modules()]
    del block
    gc.collect()
    assert all(module() is None for module in modules)
