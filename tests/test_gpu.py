"""The Triton kernel on a real GPU: numbers against fp64 in every dtype, CUDA graphs, streams, devices, autocast,
torch.compile. Runs wherever there is a CUDA device; `pytest -m gpu` runs nothing else.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mbv2_kernels as mbv2
from mbv2_kernels import reference
from mbv2_kernels._bench.cuda import without_cudnn
from mbv2_kernels.triton.offline import BLOCKS, MOBILENET_V2, OTHERS, Block

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, torch sees none", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which is not installed", allow_module_level=True)

from test_gluon_index import CASES as GLUON_CASES
from test_triton_interpreter import CASES, _run

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}
DTYPES = list(BOUNDS)
OP = torch.ops.mbv2.inverted_residual


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    """This is where the kernels are checked, so they run here on every GPU, checked before or not."""
    mbv2.set_backend("triton")
    yield
    mbv2.set_backend("auto")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def _draw(
    block: Block, batch: int, dtype: torch.dtype, device: str = "cuda"
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """(x and weights, the op's other arguments); batch statistics reach both edges of a ReLU6."""
    c, i, o, k = block.hidden_channels, block.in_channels, block.out_channels, block.kernel

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    x = rand(batch, i, block.size, block.size).contiguous(memory_format=torch.channels_last)
    tensors = (
        x,
        rand(c, i, 1, 1, scale=2 * i**-0.5) if block.expand else None,
        torch.randn(c, device=device) if block.expand else None,
        rand(c, 1, k, k, scale=2 / k),
        torch.randn(c, device=device),
        rand(o, c, 1, 1, scale=c**-0.5),
        torch.randn(o, device=device),
    )
    padding = block.dilation * (k - 1) // 2
    return tensors, (block.stride, padding, block.dilation, block.activation, block.final_activation, block.residual)


def _exact(tensors: tuple[Tensor | None, ...], config: tuple[Any, ...]) -> Tensor:
    x, *weights = (None if t is None else t.double() for t in tensors)
    stride, padding, dilation, activation, final_activation, residual = config
    with without_cudnn():
        return reference.inverted_residual(
            x, *weights, stride=stride, padding="same" if padding == -1 else padding, dilation=dilation,
            activation=activation, final_activation=final_activation, residual=residual,
        )  # fmt: skip


def _error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [b.name for b in (*MOBILENET_V2, *OTHERS)])
def test_network_shapes(name: str, batch: int, dtype: torch.dtype) -> None:
    tensors, config = _draw(BLOCKS[name], batch, dtype)
    y, want = OP(*tensors, *config), _exact(tensors, config)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    assert _error(y, want) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_branch(name: str, dtype: torch.dtype) -> None:
    """The cases of the interpreter test, in the dtypes it cannot do as well, with tiles that real hardware takes."""
    small = {"outputs": 64, "in_block": 64, "in_step": 16, "chunk": 16, "columns": 64, "warps": 4, "resident": 2}
    case = CASES[name]._replace(dtype=dtype)
    if case.tile is not None:
        kept = {field: value for field, value in case.tile.items() if field in ("columns", "two_parts")}
        case = case._replace(tile=kept)
    tensors = tuple(None if t is None else t.cuda() for t in case.tensors())
    assert _error(_run(case, None, "cuda", small), _exact(tensors, case.config())) < BOUNDS[dtype]


def test_tf32_follows_the_switch() -> None:
    tensors, config = _draw(BLOCKS["b12"], 4, torch.float32)
    want = _exact(tensors, config)
    torch.backends.cudnn.allow_tf32 = True
    assert 2e-6 < _error(OP(*tensors, *config), want) < 2e-3
    torch.backends.cudnn.allow_tf32 = False
    assert _error(OP(*tensors, *config), want) < 2e-6


def test_never_worse_than_twice_the_unfused_error() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        tensors, config = _draw(BLOCKS["b5"], 8, dtype)
        want = _exact(tensors, config)
        x, *weights = (None if t is None else t.to(dtype) for t in tensors)
        hidden = F.relu6(F.conv2d(x, weights[0], weights[1]))
        hidden = F.relu6(F.conv2d(hidden, weights[2], weights[3], padding=1, groups=hidden.shape[1]))
        unfused = F.conv2d(hidden, weights[4], weights[5]) + x
        assert _error(OP(*tensors, *config), want) < 2 * _error(unfused, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["b8", "b3", "v1_512_512_s1"])
def test_nan_and_infinity_as_in_torch(name: str, dtype: torch.dtype) -> None:
    tensors, config = _draw(BLOCKS[name], 2, dtype)
    tensors[0][1, 5, 3, 4] = float("nan")
    tensors[0][0, 2, 6, 6] = float("inf")
    y, want = OP(*tensors, *config), _exact(tensors, config)
    assert want.isnan().any() and torch.equal(y.isnan(), want.isnan())
    finite = want.isfinite()
    assert torch.equal(y.isfinite(), finite) and _error(y[finite], want[finite]) < BOUNDS[dtype]


@pytest.mark.parametrize("name", ["b3", "b8", "b15", "b17"])
@pytest.mark.parametrize("batch", [1, 64])
def test_the_same_bits_every_time(name: str, batch: int) -> None:
    """Also a race detector: an error that moves from run to run is one."""
    tensors, config = _draw(BLOCKS[name], batch, torch.float16)
    first = OP(*tensors, *config)
    for _ in range(20):
        assert torch.equal(OP(*tensors, *config), first)


def test_graph_capture_and_replay() -> None:
    tensors, config = _draw(BLOCKS["b15"], 1, torch.float16)  # batch 1: both stages of a split
    OP(*tensors, *config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OP(*tensors, *config)
    for _ in range(3):
        tensors[0].normal_()
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, OP(*tensors, *config))


@torch.no_grad()
def test_a_block_in_a_graph_keeps_its_weights() -> None:
    block = mbv2.fuse(nn.Sequential(_model().features[3]).half())
    x = torch.randn(2, 24, 28, 28, device="cuda", dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    want = block(x).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x)
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.mul_(1.5)
    mbv2.fuse(mbv2.models.mobilenet_v2(0.35))
    assert not torch.equal(block(x), want)
    junk = [torch.full((1 << 18,), float("nan"), device="cuda") for _ in range(64)]
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, want)
    del junk


def test_runs_on_the_current_stream() -> None:
    tensors, config = _draw(BLOCKS["b3"], 32, torch.float16)
    want = OP(*tensors, *config)
    source, streams = tensors[0].clone(), [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:  # scratch of one launch must not be another's
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            x = torch.zeros_like(source)
            x.copy_(source)
            results.append(OP(x, *tensors[1:], *config))
    torch.cuda.synchronize()
    assert all(torch.equal(y, want) for y in results)


def test_non_default_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices, there is one")
    tensors, config = _draw(BLOCKS["b8"], 2, torch.float16, "cuda:1")
    assert torch.cuda.current_device() == 0
    y = OP(*tensors, *config)
    assert y.device == torch.device("cuda", 1) and torch.cuda.current_device() == 0
    assert _error(y, _exact(tensors, config)) < BOUNDS[torch.float16]
    model, x = _model().to("cuda:1"), torch.randn(2, 3, 64, 64, device="cuda:1", dtype=torch.float16)
    with torch.no_grad():  # the folded weights are made there as well
        _same_answer(mbv2.fuse(copy.deepcopy(model).half()), model, x)
    assert torch.cuda.current_device() == 0


def test_offsets_beyond_32_bits() -> None:
    block = BLOCKS["b1"]
    batch = 2**31 // (block.in_channels * block.size**2) + 3
    if torch.cuda.mem_get_info()[0] < 4 * batch * block.in_channels * block.size**2:
        pytest.skip(f"needs about {batch * block.in_channels * block.size**2 * 4 >> 30} GiB of GPU memory")
    tensors, config = _draw(block, 2, torch.float16)
    x = tensors[0][:1].expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    x[-1] = tensors[0][1]
    y = OP(x, *tensors[1:], *config)
    want = OP(*tensors, *config)
    assert torch.equal(y[-1], want[1]) and torch.equal(y[-2], want[0]) and torch.equal(y[0], want[0])


def test_thousands_of_images() -> None:
    tensors, config = _draw(BLOCKS["b15"], 5001, torch.float16)
    y = OP(*tensors, *config)
    few = tuple(t[-7:] if index == 0 else t for index, t in enumerate(tensors))
    assert _error(y[-7:], _exact(few, config)) < BOUNDS[torch.float16]


def test_opcheck() -> None:
    tensors, config = _draw(BLOCKS["b8"]._replace(size=7), 2, torch.float32)
    torch.library.opcheck(OP.default, (*tensors, *config))


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = mbv2.models.mobilenet_v2(num_classes=100)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval().cuda()


def _same_answer(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    """As near to the fp64 network as twice the unfused network in the same dtype is."""
    exact = copy.deepcopy(model).double()(x.double())
    unfused = copy.deepcopy(model).to(x.dtype)(x)
    assert _error(run(x), exact) < 2 * _error(unfused, exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 16])
def test_fused_network(dtype: torch.dtype, batch: int) -> None:
    model, x = _model(), torch.randn(batch, 3, 224, 224, device="cuda", dtype=dtype)
    fused = mbv2.fuse(copy.deepcopy(model).to(dtype))
    _same_answer(fused, model, x)
    assert sum(row.backend == "triton" for row in mbv2.summary(fused)) == 17


@torch.no_grad()
def test_network_as_a_cuda_graph() -> None:
    fused = mbv2.fuse(_model().half())
    x = torch.randn(2, 3, 224, 224, device="cuda", dtype=torch.float16)
    fused(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused(x)
    x.normal_()
    graph.replay()
    assert torch.equal(y, fused(x))


@torch.no_grad()
def test_network_under_torch_compile() -> None:
    model, x = _model(), torch.randn(4, 3, 224, 224, device="cuda", dtype=torch.float16)
    fused = mbv2.fuse(copy.deepcopy(model).half())
    compiled = torch.compile(fused, fullgraph=True)
    _same_answer(compiled, model, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)


@torch.no_grad()
def test_network_under_torch_compile_with_cuda_graphs() -> None:
    """The first call of all happens inside the warm-up of a graph, whose memory pool must keep nothing of ours."""
    model, x = _model(), torch.randn(4, 3, 224, 224, device="cuda", dtype=torch.float16)
    fused = mbv2.fuse(copy.deepcopy(model).half())
    compiled = torch.compile(fused, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x.normal_()
        _same_answer(lambda x: compiled(x).clone(), model, x)


@torch.no_grad()
def test_export() -> None:
    model, x = _model(), torch.randn(2, 3, 96, 96, device="cuda", dtype=torch.float16)
    fused = mbv2.fuse(copy.deepcopy(model).half())
    exported = torch.export.export(fused, (x,)).module()
    _same_answer(exported, model, x)
    calls = [node for node in exported.graph.nodes if node.target is torch.ops.mbv2.inverted_residual_bn.default]
    assert len(calls) == 17


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=str)
def test_functional_form(weight_dtype: torch.dtype) -> None:
    tensors, config = _draw(BLOCKS["b8"], 2, torch.float16)
    x, *weights = (None if t is None else t.to(weight_dtype) for t in tensors)
    x = x.half()
    stride, padding, dilation, activation, _, residual = config
    y = mbv2.inverted_residual(
        x, *weights, stride=stride, padding=padding, dilation=dilation, activation=activation, residual=residual
    )
    assert _error(y, _exact((x, *weights), config)) < BOUNDS[torch.float16]


@torch.no_grad()
def test_default_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbv2_kernels.triton import configs

    major, minor = torch.cuda.get_device_capability()
    model, x = _model(), torch.randn(1, 3, 64, 64, device="cuda")
    for table, backend in (({}, "original modules"), ({major * 10 + minor: "this one"}, "triton")):
        monkeypatch.setattr(configs, "CHECKED", table)
        mbv2.set_backend("auto")
        fused = mbv2.fuse(copy.deepcopy(model))
        fused(x)
        assert {row.backend for row in mbv2.summary(fused) if "residual" in row.kind} == {backend}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_network_under_autocast(dtype: torch.dtype) -> None:
    model, x = _model(), torch.randn(4, 3, 224, 224, device="cuda")
    fused = mbv2.fuse(copy.deepcopy(model))
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cuda", dtype):
        y, unfused = fused(x), model(x)
    assert y.dtype == unfused.dtype
    assert _error(y, exact) < 2 * _error(unfused, exact)


def test_gradients() -> None:
    tensors, config = _draw(BLOCKS["b8"], 2, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    y = OP(*leaves, *config)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, grad)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    want = torch.autograd.grad(_exact(tuple(exact), config), exact, grad.double())
    assert all(_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True))


# ---- The Gluon kernel: everything above runs its twin unless gluon_configs.CHECKED has this GPU ----------------------


def _gluon(tensors: tuple[Tensor | None, ...], config: tuple[Any, ...], **options: Any) -> Tensor:
    """The op by the Gluon kernel; skips where that kernel does not exist."""
    from mbv2_kernels.triton import gluon_configs, ops

    capability = ops._device(tensors[0].device.index).capability  # type: ignore[union-attr]
    if ops.triton_version() < gluon_configs.OLDEST_TRITON or capability not in gluon_configs.SHARED:
        pytest.skip(f"no Gluon kernel for Triton {ops.triton_version()} and compute capability {capability / 10}")
    return ops.inverted_residual(*tensors, *config, kernel="gluon", gluon=options)  # type: ignore[arg-type]


def _twin(tensors: tuple[Tensor | None, ...], config: tuple[Any, ...]) -> Tensor:
    from mbv2_kernels.triton import ops

    return ops.inverted_residual(*tensors, *config, kernel="triton")  # type: ignore[arg-type]


GLUON_BLOCKS = [b.name for b in MOBILENET_V2] + ["k5s1", "k5s2", "v1_32_64_s1", "v1_64_128_s2"]
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("name", GLUON_BLOCKS)
def test_gluon_blocks(name: str, batch: int, dtype: torch.dtype) -> None:
    """Batch 1 splits the hidden channels of late blocks, 3 leaves a last program with parts that do not exist."""
    tensors, config = _draw(BLOCKS[name], batch, dtype)
    y, want = _gluon(tensors, config), _exact(tensors, config)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    assert _error(y, want) < BOUNDS[dtype]
    assert _error(y, want) < 2 * _error(_twin(tensors, config), want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", GLUON_CASES)
def test_gluon_every_cut(name: str, dtype: torch.dtype) -> None:
    """The cases of the CPU's index test, with their tiles and splits."""
    case = GLUON_CASES[name]
    padding = -1 if case.padding == -1 else case.pads().top
    block = Block("", 1, case.in_channels, case.hidden_channels, case.out_channels, case.kernel, expand=case.expand)
    tensors, _ = _draw(block, 1, dtype)
    x = torch.randn(case.batch, case.in_channels, case.height, case.width, device="cuda").to(dtype)
    tensors = (x.contiguous(memory_format=torch.channels_last), *tensors[1:])
    config = (case.stride, padding, 1, "relu6", "none", case.residual)
    y = _gluon(tensors, config, tile=case.tile._replace(resident=1), splits=case.splits)  # type: ignore[union-attr]
    assert _error(y, _exact(tensors, config)) < BOUNDS[dtype]


@pytest.mark.parametrize("activation", ["relu", "relu6", "none"])
@pytest.mark.parametrize("final", ["none", "relu6"])
def test_gluon_activations_and_missing_biases(activation: str, final: str) -> None:
    tensors, config = _draw(BLOCKS["b5"]._replace(size=9), 2, torch.float16)
    x, w1, _, wd, _, w2, _ = tensors
    config = (*config[:3], activation, final, False)
    for given in (tensors, (x, w1, None, wd, None, w2, None)):
        assert _error(_gluon(given, config), _exact(given, config)) < BOUNDS[torch.float16]


@pytest.mark.parametrize("name", ["b3", "b8", "b15"])
def test_gluon_sums_in_fp16(name: str) -> None:
    """Opt-in: within fp16's bound all the same."""
    tensors, config = _draw(BLOCKS[name], 8, torch.float16)
    want = _exact(tensors, config)
    error = _error(_gluon(tensors, config, half=True), want)
    print(f"{name}: fp16 sums {error:.2e}, fp32 sums {_error(_gluon(tensors, config), want):.2e}")
    assert error < BOUNDS[torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["b1", "b3", "b8", "b15"])
def test_gluon_nan_and_infinity_as_in_torch(name: str, dtype: torch.dtype) -> None:
    tensors, config = _draw(BLOCKS[name], 2, dtype)
    tensors[0][1, 5, 3, 4] = float("nan")  # type: ignore[index]
    tensors[0][0, 2, 6, 6] = float("inf")  # type: ignore[index]
    y, want = _gluon(tensors, config), _exact(tensors, config)
    assert want.isnan().any() and torch.equal(y.isnan(), want.isnan())
    finite = want.isfinite()
    assert torch.equal(y.isfinite(), finite) and _error(y[finite], want[finite]) < BOUNDS[dtype]


def test_gluon_large_biases() -> None:
    """The bias of the expand product goes through 16-bit numbers: it must not lose what fp32 has."""
    tensors, config = _draw(BLOCKS["b5"], 2, torch.float16)
    x, w1, b1, *rest = tensors
    for bias in (b1 + 3.0, torch.full_like(b1, 1e5), torch.full_like(b1, -1e5), b1 * 1e-4):  # type: ignore[operator,arg-type]
        given = (x, w1, bias, *rest)
        want = _exact(given, config)
        assert _error(_gluon(given, config), want) < BOUNDS[torch.float16]


@pytest.mark.parametrize("name", [b.name for b in MOBILENET_V2])
@pytest.mark.parametrize("batch", [1, 32])
def test_gluon_the_same_bits_every_time(name: str, batch: int) -> None:
    """Also a race detector: an error that moves from run to run is one."""
    tensors, config = _draw(BLOCKS[name], batch, torch.float16)
    first = _gluon(tensors, config)
    for _ in range(50):
        assert torch.equal(_gluon(tensors, config), first)


def test_gluon_graph_capture_and_replay() -> None:
    tensors, config = _draw(BLOCKS["b15"], 1, torch.float16)
    _gluon(tensors, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _gluon(tensors, config)
    for _ in range(3):
        tensors[0].normal_()  # type: ignore[union-attr]
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, _gluon(tensors, config))


def test_gluon_offsets_beyond_32_bits() -> None:
    block = BLOCKS["b1"]
    batch = 2**31 // (block.in_channels * block.size**2) + 3
    if torch.cuda.mem_get_info()[0] < 4 * batch * block.in_channels * block.size**2:
        pytest.skip(f"needs about {batch * block.in_channels * block.size**2 * 4 >> 30} GiB of GPU memory")
    tensors, config = _draw(block, 2, torch.float16)
    x = tensors[0][:1].expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)  # type: ignore[index]
    x[-1] = tensors[0][1]  # type: ignore[index]
    y, want = _gluon((x, *tensors[1:]), config), _gluon(tensors, config)
    assert torch.equal(y[-1], want[1]) and torch.equal(y[-2], want[0]) and torch.equal(y[0], want[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("batch", [1, 16])
def test_gluon_network(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, batch: int) -> None:
    from mbv2_kernels.triton import ops

    _gluon(*_draw(BLOCKS["b3"], 1, torch.float16))  # skips where there is none
    monkeypatch.setenv(ops.KERNEL_VARIABLE, "gluon")
    model, x = _model(), torch.randn(batch, 3, 224, 224, device="cuda", dtype=dtype)
    fused = mbv2.fuse(copy.deepcopy(model).to(dtype))
    _same_answer(fused, model, x)
    assert [(row.tier, row.reason) for row in mbv2.summary(fused) if row.backend == "triton"] == [
        ("gluon", "asked for")
    ] * 17
