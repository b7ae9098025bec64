"""Training with the rest of torch: autocast, GradScaler, torch.compile, checkpointing, torch.func, opcheck."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blocks import EPS, GRADIENT_BOUNDS, make_block, make_config, relative_error, with_grad
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from training_blocks import Block, DenseLayer, Trainable, fused, step

import mbv2_kernels as mbv2
from mbv2_kernels import _C, FusedInvertedResidual, backends
from mbv2_kernels._training_registrations import TrainBlockFunction
from mbv2_kernels.fold import BlockTensors
from mbv2_kernels.training_forward import without_running_statistics

ops = torch.ops.mbv2
X = (2, 8, 12, 10)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    mbv2.set_backend("auto")


def train_arguments(
    batch: tuple[bool, bool, bool] = (True, True, True),
    keep: bool = True,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    **shape: Any,
) -> tuple[Any, ...]:
    """What `mbv2::train_block` takes, all parameters with gradients; `memory_format`: of the weights."""
    tensors: BlockTensors = make_block(**shape, dtype=dtype)
    tensors = with_grad(
        BlockTensors(*(t if t is None or t.dim() != 4 else t.contiguous(memory_format=memory_format) for t in tensors))
    )
    config = make_config(residual=not shape.get("out_channels"))
    x = torch.randn(X).to(dtype).requires_grad_()
    return x, *without_running_statistics(tensors, batch), EPS, *config, list(batch), ["", "", ""], keep


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"keep": False},
        {"batch": (False, True, False)},
        {"expand": False, "batch": (False, True, True)},
        {"out_channels": 12, "conv_bias": True},
        {"dtype": torch.bfloat16},
        {"memory_format": torch.channels_last},
    ],
    ids=str,
)
def test_opcheck(variant: dict[str, Any]) -> None:
    arguments = train_arguments(**variant)
    opcheck(ops.train_block, arguments)
    with torch.no_grad():
        y, *saved = ops.train_block(*arguments)
    leaves = (arguments[0], *(arguments[1 + i] for first in (0, 6, 12) for i in range(first, first + 4)))
    needs = [t is not None for t in leaves]
    backward = (torch.randn_like(y), *arguments, *saved, needs)
    opcheck(ops.train_block_backward, backward, test_utils=("test_schema", "test_faketensor"))


def layer_arguments(
    shape: tuple[int, ...] = (4, 3, 3, 3),
    stride: int = 2,
    padding: int = 1,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Any, ...]:
    """What `mbv2::train_layer` takes, all parameters with gradients."""
    weight = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    vectors = [(torch.rand(len(weight)) + 0.5).to(dtype) for _ in range(3)]
    x = torch.randn(2, shape[1], 8, 9).to(dtype)
    leaves = [t.requires_grad_() for t in (x, weight, *vectors)]
    return *leaves, 1e-5, stride, padding, "relu6", ""


POINTWISE: dict[str, Any] = {"shape": (24, 8, 1, 1), "stride": 1, "padding": 0}


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"padding": -1, "dtype": torch.bfloat16},
        POINTWISE,
        {**POINTWISE, "dtype": torch.bfloat16},
        {**POINTWISE, "memory_format": torch.channels_last},
    ],
    ids=str,
)
def test_opcheck_layers(variant: dict[str, Any]) -> None:
    arguments = layer_arguments(**variant)
    opcheck(ops.train_layer, arguments)
    with torch.no_grad():
        y, *saved = ops.train_layer(*arguments)
    for needs in ([True] * 5, [False, True, False, True, False]):
        backward = (torch.randn_like(y), *arguments, *saved, needs)
        opcheck(ops.train_layer_backward, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("needs", [[True] * 13, [i in (0, 4, 9) for i in range(13)], [i == 5 for i in range(13)]])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"keep": False},
        {"batch": (False, True, False)},
        {"batch": (True, False, False), "conv_bias": True},
        {"expand": False, "batch": (False, True, True), "out_channels": 12},
        {"expand": False, "dtype": torch.bfloat16, "out_channels": 12, "keep": False},
        {"out_channels": 12, "conv_bias": True},
        {"dtype": torch.bfloat16},
        {"memory_format": torch.channels_last},
    ],
    ids=str,
)
def test_one_call_is_the_chain_of_phases(
    variant: dict[str, Any], needs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: on CPUs one op runs all phases of a block, unless several processes share the statistics."""
    arguments = train_arguments(**variant)

    def step() -> list[Tensor]:
        with torch.no_grad():
            y, *saved = ops.train_block(*arguments)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
            return [y, *saved, *ops.train_block_backward(grad, *arguments, *saved, needs)]

    calls: list[str] = []
    phases = vars(backends._PHASE_OPS).copy()
    for name in ("train_block_forward", "train_block_gradients"):
        whole = phases.pop(name)
        counted = lambda *a, whole=whole, name=name: (calls.append(name), whole(*a))[1]  # noqa: E731
        monkeypatch.setattr(backends._PHASE_OPS, name, counted)
    at_once = step()
    assert calls == ["train_block_forward", "train_block_gradients"]
    monkeypatch.setattr(backends, "_PHASE_OPS", SimpleNamespace(**phases))
    chain = step()
    assert len(at_once) == len(chain) == 22 and len(calls) == 2
    for i, (one, other) in enumerate(zip(at_once, chain, strict=True)):
        assert one.dtype is other.dtype and one.shape == other.shape and one.stride() == other.stride(), i
        assert torch.equal(one, other), i


@pytest.mark.parametrize("tier", [tier["name"] for tier in _C.tiers() if tier["runnable"]])
@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        ({"kernel_size": 3, "stride": 1}, (1, 30, 13)),  # images in parts, whose seams are computed twice
        ({"kernel_size": 3, "stride": 2}, (2, 15, 15)),
        ({"kernel_size": 3, "stride": 2}, (3, 14, 9)),
        ({"kernel_size": 5, "stride": 2, "padding": -1}, (2, 12, 10)),
        ({"kernel_size": 3, "stride": 1, "dilation": 2}, (2, 7, 7)),
    ],
    ids=str,
)
def test_e_is_kept_of_blocks_with_many_channels(geometry: dict[str, int], size: tuple[int, ...], tier: str) -> None:
    """It changes no bit of the gradients, and the op, which does not keep it, gives the same."""
    cap = _C.max_isa()
    _C.set_max_isa(tier)
    try:
        kept, (y, *grads) = eager_step(96, 112, size, **geometry)
        assert kept[-1].shape == (size[0], 112, *size[1:]) and kept[-1].dtype == torch.float32
        kept, (other, *others) = eager_step(96, 112, size, **geometry, op=True)
    finally:
        _C.set_max_isa(cap)
    assert kept[-1].shape == (96, 96) and torch.equal(y, other)
    assert len(grads) == 10 and all(map(torch.equal, grads, others))


@pytest.mark.parametrize(
    "variant",
    [
        {"in_channels": 88},
        {"hidden": 104},
        {"stride": 2, "padding": 0},  # the last row of x is under no tap
        {"stride": 4, "padding": 1},
        {"dtype": torch.bfloat16},
        {"keep": False},
    ],
    ids=str,
)
def test_e_is_not_kept_otherwise(variant: dict[str, Any]) -> None:
    kept, _ = eager_step(**{"in_channels": 96, "hidden": 112, "size": (2, 8, 8), **variant})
    assert kept[-1].dtype == torch.float64  # the Gram matrix


def eager_step(
    in_channels: int,
    hidden: int,
    size: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    keep: bool = True,
    op: bool = False,
    kernel_size: int = 3,
    **geometry: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """What a block in eager mode saves; its output, and the gradients of all its leaves."""
    torch.manual_seed(0)
    tensors = with_grad(make_block(in_channels, hidden, 100, kernel_size=kernel_size, dtype=dtype))
    x = torch.randn(size[0], in_channels, *size[1:]).to(dtype).requires_grad_()
    config = make_config(residual=False, **{"padding": kernel_size // 2 * geometry.get("dilation", 1), **geometry})
    arguments = (*without_running_statistics(tensors, [True] * 3), EPS, *config, [True] * 3, [""] * 3, keep)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y, *_ = (ops.train_block if op else TrainBlockFunction.apply)(x, *arguments)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    leaves = [t for t in (x, *tensors) if t is not None and t.requires_grad]
    return kept, [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("variant", [{}, {"padding": -1, "stride": 1}, POINTWISE], ids=str)
def test_gradcheck_of_layers(variant: dict[str, Any]) -> None:
    arguments = layer_arguments(**variant, dtype=torch.float64)
    arguments = (arguments[0][:, :, :5, :4].detach().requires_grad_(), *arguments[1:])
    assert torch.autograd.gradcheck(lambda *a: ops.train_layer(*a)[0], arguments, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ("block", "block without expand", "stem", "head"))
def test_opcheck_phases(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase, and what stands between them, as a step calls it; the two that compute d themselves also without."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    def record(name: str) -> Any:
        op = getattr(ops, name).default

        def run(*args: Any) -> Any:
            calls.append((op, args))
            return op(*args)

        return run

    names = backends.PHASES + backends.LAYER_PHASES + backends.BETWEEN_PHASES
    phases = SimpleNamespace(**{name: record(name) for name in names}, train_window=record("conv_act"))
    monkeypatch.setattr(backends, "_PHASE_OPS", phases)
    if form in ("stem", "head"):
        ops.train_layer(*layer_arguments(**(POINTWISE if form == "head" else {})))[0].sum().backward()
        expected = [name for name in backends.LAYER_PHASES if ("pointwise" in name) == (form == "head")]
    else:
        expand = form == "block"
        ops.train_block(*train_arguments((expand, True, True), expand=expand))[0].sum().backward()
        expected = list(backends.PHASES[not expand :])
    assert {op.name().removeprefix("mbv2::") for op, _ in calls} >= set(expected)
    for op, args in calls:
        opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        if op.name() == "mbv2::train_project":
            opcheck(op, (args[0], None, *args[2:]), test_utils=("test_schema", "test_faketensor"))
        if isinstance(args[-1], tuple):  # needs
            opcheck(op, (*args[:-1], (False, True)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("batch", [(True, True, True), (False, True, False)], ids=str)
def test_gradcheck(batch: tuple[bool, bool, bool]) -> None:
    """In float64, through the same arithmetic between the phases."""
    arguments = train_arguments(batch, dtype=torch.float64, in_channels=3, hidden=5, out_channels=3)
    arguments = (torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True), *arguments[1:])
    assert torch.autograd.gradcheck(lambda *a: ops.train_block(*a)[0], arguments, eps=1e-6, atol=1e-6)


KINDS: dict[str, Callable[[], Trainable]] = {
    "block": lambda: Block(out_channels=12),
    "stem": lambda: DenseLayer(3),
    "head": lambda: DenseLayer(8, 24, 1, stride=1),
}


def picture_for(model: nn.Module, batch: int = 2) -> Tensor:
    return torch.randn(batch, next(model.parameters()).shape[1], 12, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_is_refused(kind: str) -> None:
    block = fused(KINDS[kind]())
    x = picture_for(block).requires_grad_()
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a fused block is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", ("residual", *KINDS))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype: torch.dtype, kind: str) -> None:
    """Dtypes as unfused: the result in autocast's (float32 after a float32 residual), gradients in the parameters'.

    Errors as a geometric mean over some draws: a value that rounds across the edge of a clamp changes a gradient by all
    of itself, here or there.
    """
    model = Block() if kind == "residual" else KINDS[kind]()
    gradients = ("x", *dict(model.named_parameters()))
    ratios = []
    for _ in range(6):
        x = picture_for(model, batch=6)
        exact = step(copy.deepcopy(model).double(), x.double())
        ours, plain = (autocast_step(candidate, x, dtype) for candidate in (fused(model), copy.deepcopy(model)))
        for name, expected in plain.items():
            assert ours[name].dtype == expected.dtype, name
        worst = [
            [max(relative_error(found[name], exact[name]) for name in names) for names in (("y",), gradients)]
            for found in (ours, plain)
        ]
        ratios.append([mine / theirs for mine, theirs in zip(*worst, strict=True)])
    assert torch.tensor(ratios).log().mean(0).exp().max() < 2


def autocast_step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = model(leaf)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"y": y.detach(), "x": leaf.grad, **gradients, **dict(model.named_buffers())}


def test_float16_under_a_grad_scaler() -> None:
    model = fused(Block())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # too large: the first steps must be skipped, not poisoned
    before = copy.deepcopy(model.state_dict())
    losses, scales = [], []
    for _ in range(16):
        optimiser.zero_grad()
        torch.manual_seed(3)
        x = torch.randn(X)
        with torch.autocast("cpu", torch.float16):
            loss = (model(x) - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[0] < 2.0**24 and losses[-1] < losses[0]
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert any(not torch.equal(t, before[name]) for name, t in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    """Reentrant, the statistics are updated twice, as for any BatchNorm in such a region; else the recomputation stops
    when it has the tensors it needs, and that is before their update."""
    model = fused(KINDS[kind]())
    *_, norm = (path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    x = picture_for(model)
    for reentrant in (True, False):
        plain, again = copy.deepcopy(model), copy.deepcopy(model)
        expected = step(plain, x)

        def run(t: Tensor, again: nn.Module = again, reentrant: bool = reentrant) -> Any:
            return checkpoint(again, t, use_reentrant=reentrant)

        leaf = x.clone().requires_grad_()
        run(leaf).backward(torch.randn(expected["y"].shape, generator=torch.Generator().manual_seed(1)))
        assert torch.equal(leaf.grad, expected["x"])
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter.grad, expected[name]), name
        assert int(again.get_submodule(norm).num_batches_tracked) == 1 + reentrant


def test_deterministic_algorithms_are_no_obstacle() -> None:
    model = Block()
    x = torch.randn(X)
    torch.use_deterministic_algorithms(True)  # the fixture has it with warn_only, and restores it
    first, second = step(fused(model), x), step(fused(model), x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_forward_mode_and_torch_func_run_the_original() -> None:
    model = fused(Block())
    x = torch.randn(X)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (x,)).square().sum()

    def buffers() -> dict[str, Tensor]:
        return {name: b.clone() for name, b in model.named_buffers()}

    grads = torch.func.grad(loss)(parameters, buffers())
    assert "torch.func" in mbv2.summary(model)[0].reason
    loss({name: p.detach().requires_grad_() for name, p in parameters.items()}, buffers())
    assert mbv2.summary(model)[0].backend == "cpu"
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(grads[name], parameter.grad.double()) < GRADIENT_BOUNDS[torch.float32] * 10, name


def test_no_grad_in_training_mode_only_updates_the_statistics() -> None:
    model = Block()
    ours, plain = fused(model), copy.deepcopy(model)
    x = torch.randn(X)
    with torch.no_grad():
        y = ours(x)
        plain(x)
    assert y.grad_fn is None
    for (name, buffer), expected in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(buffer, expected, rtol=1e-6, atol=1e-6), name


def test_a_run_of_blocks_trains_without_gradients_too() -> None:
    """Without gradients neighbouring blocks run by one call, with running statistics: not in training mode."""
    model = nn.Sequential(FusedInvertedResidual(8, 8), FusedInvertedResidual(8, 12), FusedInvertedResidual(12, 12))
    plain = mbv2.unfuse(copy.deepcopy(model))
    mbv2.fuse(model)
    x = torch.randn(X)
    with torch.no_grad():
        for norms_in_training in (True, False):
            for module in (*model.modules(), *plain.modules()):
                module.training = norms_in_training
            assert relative_error(model(x), plain(x).double()) < 2e-6
    for (name, buffer), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(buffer, expected, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_backend_trains_too(kind: str) -> None:
    model = KINDS[kind]()
    x = picture_for(model)
    expected = step(fused(model), x)
    mbv2.set_backend("reference")
    ours = fused(model)
    got = step(ours, x)
    assert mbv2.summary(ours)[0].backend == "reference"
    for name, tensor in got.items():
        if tensor.is_floating_point() and tensor.norm() > 0:
            assert relative_error(tensor, expected[name].double()) < GRADIENT_BOUNDS[torch.float32], name


def test_compiled_training_steps() -> None:
    """fullgraph, no recompilation over steps; the running statistics move, and eval mode then sees new ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        DenseLayer(3),
        FusedInvertedResidual(8, 8, momentum=None),
        FusedInvertedResidual(8, 12, stride=2, memory="lean"),
        DenseLayer(12, 24, 1, stride=1, momentum=None),
    )
    mbv2.fuse(model, filter_fn=lambda module, path: isinstance(module, DenseLayer))
    eager, ours = copy.deepcopy(model), copy.deepcopy(model)
    compiled = torch.compile(ours, fullgraph=True)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        ours.eval()(x)  # folds and packs the weights as they are now
        ours.train()
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (eager, ours)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            for module, optimiser in zip((eager, compiled), optimisers, strict=True):
                optimiser.zero_grad()
                module(x).square().mean().backward()
                optimiser.step()
    for (name, ours_), theirs in zip(ours.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.allclose(ours_, theirs, rtol=1e-4, atol=1e-6), name
    assert {row.backend for row in mbv2.summary(ours)} == {"cpu"}
    with torch.no_grad():
        expected = mbv2.unfuse(copy.deepcopy(ours)).eval()(x)
        assert relative_error(ours.eval()(x), expected.double()) < 1e-5
