"""The phases of a training step on a real GPU: numbers against the fp64 oracle in every dtype, the same bits every
time, CUDA graphs, 64-bit offsets. Runs wherever there is a CUDA device; `pytest -m gpu` runs nothing else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mbv2_kernels import training_reference as oracle
from mbv2_kernels._bench.cuda import without_cudnn
from mbv2_kernels.triton.offline import BLOCKS

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, torch sees none", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which is not installed", allow_module_level=True)

from test_triton_training import CASES, TILED, Case, check, draw, expected, run, tensors

from mbv2_kernels.triton import training_ops

pytestmark = pytest.mark.gpu
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
GPU_TILE = {"rows": 64, "block": 64, "warps": 4}  # the smallest that every kind of tensor-core instruction takes


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def _case(name: str, dtype: torch.dtype, batch: int, **changes: Any) -> Case:
    block = BLOCKS[name]
    case = Case(
        batch=batch, in_channels=block.in_channels, hidden_channels=block.hidden_channels,
        out_channels=block.out_channels, height=block.size, width=block.size, kernel=block.kernel, stride=block.stride,
        dilation=block.dilation, activation=block.activation, final_activation=block.final_activation,
        residual=block.residual, expand=block.expand, dtype=dtype, tile=None, programs=training_ops.PROGRAMS,
    )  # fmt: skip
    return case._replace(**changes)


def _check(case: Case) -> None:
    arguments = draw(case, "cuda")
    results = run(case, arguments)
    for phase in case.phases:
        with without_cudnn():
            want = expected(phase, arguments[phase])
            like = tensors(getattr(oracle, phase)(*arguments[phase]))
        check(phase, case.dtype, results[phase], want, like)


# Few, for a GPU that is lent for minutes: each kernel compiles for a second or two.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, FP16) for name in ("b1", "b2", "b3", "b8", "b15", "k5s2", "v1_512_512_s1")), ("b3", BF16), ("b3", FP32)],
    ids=str,
)
def test_network_shapes(name: str, dtype: torch.dtype) -> None:
    _check(_case(name, dtype, batch=3))


@pytest.mark.parametrize("name", [
    "plain", "lean", "stride 2, odd", "same, kernel 5", "several images a tile, the last not full",
    "channels no multiple of anything", "columns shared by programs", "split over hidden channels", "no expand, lean",
    "final relu6", "only wd", "64-bit offsets",
])  # fmt: skip
def test_branches_in_bfloat16(name: str) -> None:
    """Cases of the interpreter test in the dtype that it cannot do."""
    case = CASES[name]
    _check(case._replace(dtype=BF16, tile=None if case.tile is None else case.tile | GPU_TILE))


@pytest.mark.parametrize("name", ["b3", "b8", "b15"])
def test_the_same_bits_every_time(name: str) -> None:
    """Also a race detector: an error that moves from run to run is one."""
    case = _case(name, torch.float16, batch=32)
    arguments = draw(case, "cuda")
    first = run(case, arguments)
    for _ in range(10):
        again = run(case, arguments)
        for phase in case.phases:
            assert all(torch.equal(a, b) for a, b in zip(again[phase], first[phase], strict=True)), phase


def test_graph_capture_and_replay() -> None:
    case = _case("b8", torch.float16, batch=4)
    arguments = draw(case, "cuda")
    run(case, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, arguments)
    for results in captured.values():
        for t in results:
            t.fill_(float("nan"))
    graph.replay()
    for phase, results in run(case, arguments).items():
        assert all(torch.equal(a, b) for a, b in zip(captured[phase], results, strict=True)), phase


def test_tf32_follows_the_switch() -> None:
    case = _case("b12", torch.float32, batch=2, phases=("train_project",))
    arguments = draw(case, "cuda")
    want = expected("train_project", arguments["train_project"])[0]

    def error() -> float:
        z = run(case, arguments)["train_project"][0]
        return ((z.double() - want).norm() / want.norm()).item()

    torch.backends.cudnn.allow_tf32 = True
    assert 2e-6 < error() < 2e-3
    torch.backends.cudnn.allow_tf32 = False
    assert error() < 2e-6


def test_offsets_beyond_32_bits() -> None:
    """D of more than 2**31 elements; its last image is computed as the only one of a small batch is."""
    case = _case("b2", torch.float16, batch=2, phases=TILED)
    few = draw(case, "cuda")
    d = few["train_project"][1]
    batch = 2**31 // d[0].numel() + 3
    if torch.cuda.mem_get_info()[0] < 2**35:
        pytest.skip("needs 32 GiB of GPU memory")

    def many(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() != 4 or t.shape[0] != 2:
            return t
        repeated = t[:1].expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        repeated[-1] = t[1]
        return repeated

    d, *_ = training_ops.train_depthwise(*map(many, few["train_depthwise"]))
    assert torch.equal(d[-1], training_ops.train_depthwise(*few["train_depthwise"])[0][1])
    del d
    z, *_ = training_ops.train_project(*map(many, few["train_project"]))
    assert torch.equal(z[-1], training_ops.train_project(*few["train_project"])[0][1])
    del z
    phase = few["train_depthwise_backward"]
    g, *_ = training_ops.train_depthwise_backward(*map(many, phase), splits=1)
    assert torch.equal(g[-1], training_ops.train_depthwise_backward(*phase, splits=1)[0][1])
