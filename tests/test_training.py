"""A training step of one fused block against float64 and the unfused block, in every form that a block can have."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from blocks import relative_error
from torch import nn
from training_blocks import Block, check_step, fused, step

import mbv2_kernels as mbv2
from mbv2_kernels import FusedInvertedResidual

FORMS: dict[str, dict[str, Any]] = {
    "residual": {},
    "stride2": {"out_channels": 12, "stride": 2},
    "k5_dilated": {"kernel_size": 5, "dilation": 2},
    "same_stride2": {"same": True, "stride": 2},
    "relu": {"activation": nn.ReLU},
    "no_expand_final": {"expand": False, "final": nn.ReLU6, "out_channels": 16},
    "final_relu": {"final": nn.ReLU},
    "not_affine": {"affine": False},
    "biases": {"bias": True},
    "no_first_norm": {"norms": (False, True, True), "bias": True},
    "no_second_norm": {"norms": (True, False, True)},
    "no_last_norm": {"norms": (True, True, False), "bias": True},
    "cumulative": {"momentum": None},
    "odd_channels": {"in_channels": 5, "hidden": 17, "out_channels": 5},
    "wide": {"in_channels": 24, "hidden": 144, "out_channels": 24},
}


@pytest.mark.parametrize("form", FORMS)
def test_step_in_float32(form: str) -> None:
    options = FORMS[form]
    check_step(Block(**options), 3, options.get("in_channels", 8), 13, 10)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("form", ("residual", "stride2", "no_expand_final"))
def test_step_in_16_bits(form: str, dtype: torch.dtype) -> None:
    check_step(Block(**FORMS[form]).to(dtype), 4, 8, 24, 20, dtype=dtype)


@pytest.mark.parametrize("frozen", range(1, 8))
def test_frozen_norms_in_any_mix(frozen: int) -> None:
    """A BatchNorm in eval mode uses its running statistics, leaves them alone, and still passes gradients."""
    model = Block(bias=True)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.train(not frozen >> i & 1)
    check_step(model, 3, 8, 11, 9)


@pytest.mark.parametrize("learned", ("depthwise", "before.0", "before.1", "after.0", "after.2", "after.3", "x", ""))
def test_partly_frozen_parameters(learned: str) -> None:
    """What does not require a gradient gets none, and the rest gets the same as ever."""
    model = Block()
    x = torch.randn(2, 8, 9, 9)
    full = step(fused(model), x)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(learned) and learned != "")
    ours = fused(model)
    x.requires_grad_(learned == "x")
    y = ours(x)
    assert y.requires_grad == bool(learned)
    if not learned:
        return
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    names = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert names or learned == "x"
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == (name in names), name
    for name in names:
        assert torch.equal(ours.get_parameter(name).grad, full[name]), name
    if learned == "x":
        assert torch.equal(x.grad, full["x"])


def test_lean_memory_changes_nothing_but_memory() -> None:
    model = Block().bfloat16()
    x = torch.randn(2, 8, 12, 11).bfloat16()
    kept: dict[str, int] = {}
    results = []
    for memory in ("fast", "lean"):
        seen: dict[int, int] = {}
        ours = fused(model, memory=memory)

        def pack(t: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            results.append(step(ours, x))
        kept[memory] = sum(seen.values())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert kept["fast"] - kept["lean"] == 2 * 24 * 12 * 11 * 2  # d


def test_results_do_not_depend_on_threads() -> None:
    model = Block(24, 24, 144)
    x = torch.randn(5, 24, 28, 28)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(step(fused(model), x))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_one_value_a_channel_raises_as_torch_does() -> None:
    for form in ({}, {"stride": 2}, {"expand": False}):
        model = Block(**form)
        x = torch.randn(1, 8, 2 if form.get("stride") else 1, 1)
        with pytest.raises(ValueError) as theirs:
            copy.deepcopy(model)(x)
        with pytest.raises(ValueError) as ours:
            fused(model)(x)
        assert str(ours.value) == str(theirs.value) and "more than 1 value per channel" in str(ours.value)


def test_an_empty_batch_leaves_the_statistics() -> None:
    """But counts, as torch has it."""
    model = Block()
    x = torch.empty(0, 8, 9, 9)
    ours, plain = step(fused(model), x), step(copy.deepcopy(model), x)
    for name, expected in plain.items():
        assert torch.equal(ours[name], expected), name


def test_batches_far_from_zero() -> None:
    """Statistics come from sums: they must not cancel where the mean is large beside the deviation."""
    model = Block(norms=(True, True, True))
    x = torch.randn(4, 8, 16, 16) * 0.1 + 10
    plain, exact, got = step(copy.deepcopy(model), x), step(copy.deepcopy(model).double(), x.double()), None
    got = step(fused(model), x)
    for name in ("before.1.running_var", "before.1.running_mean", "y"):
        error = ((got[name] - exact[name]).norm() / exact[name].norm()).item()
        unfused = ((plain[name] - exact[name]).norm() / exact[name].norm()).item()
        assert error < 2 * unfused + 2e-7, f"{name}: {error:.1e}, unfused {unfused:.1e}"


def test_nan_and_infinity_flow() -> None:
    model = Block(out_channels=12)
    x = torch.randn(2, 8, 9, 9)
    x[0, 0, 0, 0] = math.nan
    got = step(fused(model), x)
    assert got["y"].isnan().any() and got["x"].isnan().any()


def test_strides_of_input_and_gradient_do_not_matter() -> None:
    model = fused(Block())
    x = torch.randn(2, 8, 10, 12)
    expected = step(copy.deepcopy(model), x, torch.ones(2, 8, 10, 12))
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        got = step(copy.deepcopy(model), other, torch.ones(1).expand(2, 8, 10, 12))
        assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("frozen", (False, True))
def test_gradients_have_the_strides_of_their_parameters(frozen: bool) -> None:
    """In channels_last a 1x1 weight has others than a contiguous one, though the same numbers at the same places."""
    model = Block(bias=True).to(memory_format=torch.channels_last)
    model.train(not frozen)
    model.depthwise.weight.data = model.depthwise.weight.data.transpose(2, 3)
    ours, plain = fused(model), copy.deepcopy(model)
    x = torch.randn(2, 8, 9, 7)
    got, expected = step(ours, x), step(plain, x)
    for name, parameter in ours.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name
        assert torch.allclose(got[name], expected[name], rtol=1e-3, atol=1e-3), name


def test_a_few_optimiser_steps_in_a_small_network() -> None:
    """Losses, weights and running statistics stay together over steps, and eval mode sees the trained weights."""
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        FusedInvertedResidual(8, 8, expand_ratio=1),
        FusedInvertedResidual(8, 16, stride=2),
        FusedInvertedResidual(16, 16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    mbv2.unfuse(plain)
    models = [fused(plain), plain, copy.deepcopy(plain).double()]
    x, labels = torch.randn(16, 3, 32, 32), torch.randint(4, (16,))
    losses = []
    for model in models:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(6):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)), labels)
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
        with torch.no_grad():
            losses[-1].append(model.eval()(x.to(model[0].weight.dtype)).norm().item())
    ours, theirs, exact = (torch.tensor(row, dtype=torch.float64) for row in losses)
    assert exact[5] < 0.9 * exact[0]
    assert ((ours - exact).abs() / exact).max() < max(1e-5, 3 * ((theirs - exact).abs() / exact).max())
    assert {row.backend for row in mbv2.summary(models[0]) if row.kind not in ("stem", "head")} == {"cpu"}
    for (name, ours), plain, expected in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), models[2].state_dict().values(), strict=True
    ):
        if ours.is_floating_point():
            assert relative_error(ours, expected) < 3 * relative_error(plain, expected) + 1e-5, name
