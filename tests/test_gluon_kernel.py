"""The Gluon kernel's own code, run on the CPU by gluon_emulator.py and launched by ops.py: right against fp64, and no
asynchronous copy or wgmma without its wait, fence and barrier. Many shapes, nothing compiled: layouts and the barriers
that Triton adds are in test_triton_ptx.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gluon_emulator
import pytest
import torch
from blocks import BOUNDS, make_weights
from test_gluon_index import CASES, Case

import mbv2_kernels.triton
from mbv2_kernels import reference
from mbv2_kernels.triton import gluon_configs, offline, ops
from mbv2_kernels.triton.configs import Device, Problem

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes the emulated kernel, possibly with another text, the one that ops.py launches."""

    def sum_splits(
        partial: Any, b3: Any, x: torch.Tensor, y: torch.Tensor, splits: int, final: str, residual: bool
    ) -> None:
        sums = partial.view(splits, y.shape[0], *y.shape[2:], y.shape[1]).sum(0) + (0 if b3 is None else b3)
        y.copy_(sums.permute(0, 3, 1, 2) + (x if residual else 0))

    def replace(old: str = "", new: str = "") -> None:
        def edit(source: str) -> str:
            assert not old or source.count(old) >= 1
            return source.replace(old, new) if old else source

        kernels = gluon_emulator.load_kernels(edit)
        monkeypatch.setattr(mbv2_kernels.triton, "gluon_kernels", kernels, raising=False)

    monkeypatch.setattr(ops, "_sum_splits", sum_splits)
    gluon_emulator.IMPLICIT.clear()
    replace()
    return replace


def inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, list[Any]]:
    x = torch.randn(case.batch, case.in_channels, case.height, case.width).to(dtype)
    weights = make_weights(
        case.in_channels, case.hidden_channels, case.out_channels, case.kernel, expand=case.expand, dtype=dtype
    )
    return x.contiguous(memory_format=torch.channels_last), weights


def emulate(case: Case, x: torch.Tensor, weights: list[Any], half: bool = False, **acts: str) -> torch.Tensor:
    problem = Problem(
        case.batch, *case.out(), case.in_channels, case.hidden_channels, case.out_channels, case.kernel, case.stride, 1,
        case.expand, 2,
    )  # fmt: skip
    device, pads = Device(case.capability, 100), case.pads()
    plan = gluon_configs.plan(problem, device, pads, case.height * case.width, case.tile, case.splits, half)
    assert plan is not None
    y = torch.full((case.batch, case.out_channels, *case.out()), float("nan"), dtype=x.dtype)
    y = y.contiguous(memory_format=torch.channels_last)
    activation, final = acts.get("activation", "relu6"), acts.get("final_activation", "none")
    ops._launch_gluon(
        x, tuple(weights), y, plan, case.kernel, case.stride, pads.top, pads.left, activation, final, case.residual
    )
    return y


def exact(case: Case, x: torch.Tensor, weights: list[Any], **acts: str) -> torch.Tensor:
    w1, b1, wd, b2, w2, b3 = (None if w is None else w.double() for w in weights)
    top, bottom, left, right = case.pads()
    # padding is of the hidden tensor, and possibly not the same on all sides
    clamp = {"relu6": lambda t: t.clamp(0, 6), "relu": torch.relu, "none": lambda t: t}[acts.get("activation", "relu6")]
    hidden = x.double() if w1 is None else clamp(torch.nn.functional.conv2d(x.double(), w1, b1))
    hidden = torch.nn.functional.pad(hidden, (left, right, top, bottom))
    acts = {"activation": "relu6", "final_activation": "none"} | acts
    y = reference.inverted_residual(hidden, None, None, wd, b2, w2, b3, stride=case.stride, padding=0, **acts)
    return y + x.double() if case.residual else y


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def agree(y: torch.Tensor, want: torch.Tensor) -> None:
    bound = BOUNDS[y.dtype]
    assert error(y, want) < bound
    # no single output is off either: a corner that read the wrong pixel would hide in a norm
    assert (y.double() - want).abs().max() < 4 * bound * want.abs().max()


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.height < 29])
def test_cases(install: Install, name: str) -> None:
    """Every form: strides, paddings, kernels, several images a program, splits, channels that a last chunk lacks."""
    case = CASES[name]
    x, weights = inputs(case, torch.float16)
    agree(emulate(case, x, weights), exact(case, x, weights))


def network_case(block: offline.Block, capability: int, batch: int) -> Case:
    """A block with the tile that the tables choose; of a large image a corner, larger than a part."""
    size = min(block.size, 16 * block.stride)
    return Case(
        batch, size, size, stride=block.stride, in_channels=block.in_channels, hidden_channels=block.hidden_channels,
        out_channels=block.out_channels, expand=block.expand, residual=block.residual, capability=capability,
        tile=gluon_configs.choose_tiles(block.problem(256), Device(capability, 100))[0], splits=1,
    )  # fmt: skip


DISTINCT = list({b._replace(name=""): b for b in offline.MOBILENET_V2}.values())


@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.float16), (90, torch.bfloat16)])
@pytest.mark.parametrize("block", DISTINCT, ids=lambda b: b.name)
def test_blocks_of_the_network(install: Install, block: offline.Block, capability: int, dtype: torch.dtype) -> None:
    case = network_case(block, capability, batch=1 if block.size > 7 else 3)
    x, weights = inputs(case, dtype)
    agree(emulate(case, x, weights), exact(case, x, weights))


def test_a_split_block(install: Install) -> None:
    """Batch 1 of a late block: the hidden channels shared by the programs that the table asks for."""
    case = network_case(offline.BLOCKS["b15"], 90, batch=1)._replace(splits=None)
    x, weights = inputs(case, torch.float16)
    agree(emulate(case, x, weights), exact(case, x, weights))


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_other_activations_and_no_biases(install: Install, activation: str) -> None:
    case = CASES["odd sizes"]
    x, weights = inputs(case, torch.float16)
    weights = [None if i in (1, 3, 5) else w for i, w in enumerate(weights)]
    acts = {"activation": activation, "final_activation": "relu6"}
    agree(emulate(case, x, weights, **acts), exact(case, x, weights, **acts))


def test_fp16_sums_are_within_the_bound_and_worse_than_fp32_ones(install: Install) -> None:
    case = CASES["56"]._replace(height=16, width=16, in_channels=24, hidden_channels=144, out_channels=24)
    x, weights = inputs(case, torch.float16)
    want = exact(case, x, weights)
    single, half = (error(emulate(case, x, weights, half=half), want) for half in (False, True))
    print(f"fp32 sums {single:.2e}, fp16 sums {half:.2e}")
    assert single < half < BOUNDS[torch.float16]


@pytest.mark.parametrize("name", ["odd sizes", "7 x 7, images share zeros", "stride 2, odd", "no expand"])
def test_a_nan_reaches_its_outputs_and_no_others(install: Install, name: str) -> None:
    case = CASES[name]
    x, weights = inputs(case, torch.float16)
    clean = emulate(case, x, weights)
    x[-1, 0, 2, 3] = float("nan")
    y, want = emulate(case, x, weights), exact(case, x, weights)
    assert torch.equal(y.isnan(), want.isnan()) and 0 < int(y.isnan().sum()) < y.numel()
    assert torch.equal(y[~y.isnan()], clean[~y.isnan()])


def test_infinite_pixels(install: Install) -> None:
    """ReLU6 bounds them; the padding columns and channels that they meet are zeros, and zero times infinity is NaN."""
    case = CASES["last chunk with 1 of 4 times 16"]
    x, weights = inputs(case, torch.float16)
    x[0, 1, 4, 4] = float("inf")
    agree(emulate(case, x, weights), exact(case, x, weights))


@pytest.mark.parametrize("capability", [80, 90])
def test_the_loop_needs_only_its_own_barriers(install: Install, capability: int) -> None:
    """Triton has to add one barrier a program, behind the table of pixels; the loop's two are enough for the rest."""
    case = CASES["last chunk half empty"]._replace(capability=capability, batch=1)
    emulate(case, *inputs(case, torch.float16))
    text = gluon_emulator.KERNELS.read_text().splitlines()
    assert {text[line - 1].strip() for line in gluon_emulator.IMPLICIT} == {"x_pixel = pixels.gather(p, 0)"}


# Text of the kernel, what to put in its place, and whether Ampere needs it too.
WAIT = "async_copy.wait_group(0)"
FAULTS = {
    "no barrier 1": ("gl.barrier()  # 1", "pass", True),
    "no barrier 2": ("gl.barrier()  # 2", "pass", True),
    "no wait for x and w1": (f"{WAIT}  # x, w1", "pass", True),
    "no wait for w2": (f"{WAIT}  # w2", "pass", True),
    "no fence": ("fence_async_shared()", "pass", False),
    "no wait for wgmma": ("acc_a = warpgroup_mma_wait(0, [acc_a])", "pass", False),
    "w1 copied too early": (
        "gl.barrier()  # 1",
        "gl.barrier(); _copy_rows(w1, w1_ptr, 0, C, CIN, 0, CIN, WARPS)",
        True,
    ),
    "a wrong tap": ("tap // K * IW + tap % K", "tap % K * IW + tap // K", True),
    "taps not permuted": ("packed_column(tap_c) if EXPAND", "tap_c if EXPAND", True),
    "no zeros in front": ("es.scatter(gl.zeros_like(zeros).to(DTYPE), zeros, 0)", "pass", True),
    "no mask": ("mask = valid[:, None] & (o < COUT)[None, :]", "mask = (o < COUT)[None, :]", True),
}


@pytest.mark.parametrize(
    ("fault", "capability"), [(f, sm) for f, (_, _, both) in FAULTS.items() for sm in ((80, 90) if both else (90,))]
)
def test_a_fault_in_the_kernel_is_noticed(install: Install, fault: str, capability: int) -> None:
    """The checks above can fail: each of these edits gives NaN, wrong numbers or an error."""
    install(*FAULTS[fault][:2])
    case = CASES["7 x 7, images share zeros"]._replace(capability=capability)
    x, weights = inputs(case, torch.float16)
    want = exact(case, x, weights)
    try:
        noticed = not error(emulate(case, x, weights), want) < BOUNDS[torch.float16]
        noticed = noticed or len(gluon_emulator.IMPLICIT) > 1
    except (AssertionError, IndexError, RuntimeError):
        noticed = True
    assert noticed
