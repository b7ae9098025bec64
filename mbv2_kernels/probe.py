"""Runs a module on small inputs to learn what its layers alone do not tell.

Modules do not show a residual, an activation called as a function, padding done in `forward`. `confirm` finds out by
comparing one run of the block with the reference; `elementwise` tells what a parameterless leaf computes. Everything
happens on fp64 copies on the CPU, with random values of our own: neither the model nor torch's global random state is
touched, and meta tensors are no obstacle.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import TorchDispatchMode

from . import reference
from .backends import BlockConfig, LayerConfig
from .chain import FusedChain
from .composition import Refused
from .fold import BlockTensors, Layer
from .fused_forward import FusedForward

if TYPE_CHECKING:
    from .recognise import Structure

    SomeStructure = TypeVar("SomeStructure", bound=Structure)

TOLERANCE = 1e-9  # relative, fp64: two orders of the same sums differ by 1e-15, any other computation by far more
_ACTIVATIONS = ("relu6", "relu", "none")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class DirectDepthwise(TorchDispatchMode):
    """Computes depthwise convolutions tap by tap: torch's fp64 kernel loops over the groups, 50 times slower."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, bias, stride, padding, dilation, transposed, _, groups = args
            if groups == x.shape[1] == weight.shape[0] and x.dim() == 4 and not transposed:
                return _depthwise(x, weight, bias, *(v * 2 if len(v) == 1 else v for v in (stride, padding, dilation)))
        return func(*args, **(kwargs or {}))


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any) -> Tensor:
    x = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    kernel = weight.shape[2:]
    rows, columns = ((x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    y = x.new_zeros(()) if bias is None else bias[:, None, None]
    for i, j in itertools.product(range(kernel[0]), range(kernel[1])):
        seen = x[:, :, i * dilation[0] :: stride[0], j * dilation[1] :: stride[1]][:, :, :rows, :columns]
        y = y + seen * weight[:, 0, i, j, None, None]
    return y


def is_plain_forward(module: nn.Module) -> bool:
    """False where other code has put a `forward` on the instance."""
    return isinstance(vars(module).get("forward"), FusedForward | FusedChain | None)


def confirm(structure: SomeStructure) -> SomeStructure:
    """`structure` with the configuration that its module was seen to compute; raises Refused if there is none.

    It runs on two images, odd by even and even by odd, that are larger than the (dilated) kernel. Its values are
    such that both ends of each clamp are reached.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    conv, channels = structure.window, structure.in_channels
    reach = conv.dilation[0] * (conv.kernel_size[0] - 1) + 1
    sizes = ((1, channels, reach + 1, reach + 2), (1, channels, reach + 2, reach + 1))  # reach is odd
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, device="cpu") for s in sizes]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _one_thread(), DirectDepthwise():
        try:
            twins: dict[int, Any] = {}
            block = _copy(structure.block, twins).eval()
            layers = [(twins.get(id(a.conv)), twins.get(id(a.norm))) if a else (None, None) for a in structure.layers]
            _randomise(block, layers, generator)
            outputs = [_run(block, x) for x in inputs]
            weights = _folded(layers)
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"it could not be run on a small image: {_one_line(error)}") from error
        closest = float("inf")
        for config in _hypotheses(structure.config, conv):
            for x, y in zip(inputs, outputs, strict=True):
                difference = _difference(config, weights, x, y)
                closest = min(closest, difference)
                if difference > TOLERANCE:
                    break
            else:
                found: Any = {"config": config, "eval_only": _looks_at_training(block, inputs[0], outputs[0])}
                found["untrainable"] = _untrainable(norm for _, norm in layers)
                return replace(structure, **found)
    roles = "expand, depthwise, project" if len(structure.layers) == 3 else "convolution, norm, activation"
    raise Refused(
        f"its forward computes something else than {roles} of these layers (relative difference {closest:.2g})"
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads only cost here: the tensors are tiny, and on shared or capped cores each start takes milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of the calling thread; others keep theirs
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def elementwise(module: nn.Module) -> str | None:
    """What a leaf computes in eval mode: "identity", "relu", "relu6", or None for anything else."""
    x = _grid()
    y = _apply(module, x)
    if y is None or y.shape != x.shape:
        return None
    for name, expected in (("identity", x), ("relu6", x.clamp(0, 6)), ("relu", x.clamp(min=0))):
        if torch.equal(y, expected):
            return name
    return None


def keeps_shape(module: nn.Module) -> bool:
    """True for activations in the wide sense: they work at each element, or at least give back the same shape."""
    y = _apply(module, _grid())
    return y is not None and y.shape == _grid().shape


def _grid() -> Tensor:
    return torch.linspace(-9, 9, 2 * 3 * 5 * 6, dtype=torch.float64, device="cpu").reshape(2, 3, 5, 6)


def _apply(module: nn.Module, x: Tensor) -> Tensor | None:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            y = _copy(module, {}).eval()(x.clone())
        except Exception:  # whatever it wants, it is no elementwise function of one tensor
            return None
    return y if isinstance(y, Tensor) and y.dtype == x.dtype else None


def _run(block: nn.Module, x: Tensor) -> Tensor:
    given = x.clone()
    y = block(given)
    if not isinstance(y, Tensor):
        raise Refused(f"its forward returns {type(y).__name__}, not one tensor")
    if not torch.equal(given, x):
        raise Refused("its forward changes its input in place")
    return y


def _folded(layers: list[tuple[Any, Any]]) -> tuple[Tensor | None, ...]:
    """What a block's or a layer's reference takes: weights and biases with the BatchNorms folded in."""
    tensors = [t for conv, norm in layers for t in _tensors(conv, norm)]
    eps = [0.0 if norm is None else float(norm.eps) for _, norm in layers]
    if len(layers) == 1:
        return Layer._make(tensors).folded(eps[0])
    return BlockTensors._make(tensors).folded((eps[0], eps[1], eps[2]))


def _paddings(guess: int, conv: nn.Conv2d) -> Iterator[int]:
    centred = conv.dilation[0] * (conv.kernel_size[0] - 1) // 2
    return iter(dict.fromkeys((guess, centred, reference.SAME)))


def _hypotheses(guess: BlockConfig | LayerConfig, conv: nn.Conv2d) -> Iterator[BlockConfig | LayerConfig]:
    """`guess` first, then whatever else the modules leave open."""
    yield guess
    activations = dict.fromkeys((guess.activation, *_ACTIVATIONS))
    if isinstance(guess, LayerConfig):
        for padding, activation in itertools.product(_paddings(guess.padding, conv), activations):
            yield guess._replace(padding=padding, activation=activation)
        return
    finals = dict.fromkeys((guess.final_activation, "none", "relu6", "relu"))
    for final, padding, residual, activation in itertools.product(
        finals, _paddings(guess.padding, conv), (True, False), activations
    ):
        if residual and (final != "none" or guess.stride != 1):
            continue
        yield guess._replace(final_activation=final, padding=padding, residual=residual, activation=activation)


def _difference(config: BlockConfig | LayerConfig, weights: tuple[Any, ...], x: Tensor, y: Tensor) -> float:
    compute: Any = reference.inverted_residual if isinstance(config, BlockConfig) else reference.conv_act
    try:
        expected = compute(x, *weights, **config._asdict())
    except RuntimeError:  # a residual where the channels differ
        return float("inf")
    if expected.shape != y.shape or y.dtype != expected.dtype:
        return float("inf")
    difference = float((y - expected).norm() / expected.norm())
    return difference if difference == difference else float("inf")  # NaN is no agreement


def _looks_at_training(block: nn.Module, x: Tensor, y: Tensor) -> bool:
    """True if the block computes something else once its `training` flag is set and its layers stay in eval mode."""
    for module in block.modules():
        layer = isinstance(module, (nn.Conv2d, ParametrizationList)) or hasattr(module, "running_mean")
        module.training = bool(module._modules) and not layer
    try:
        return not torch.equal(_run(block, x), y)
    except Exception:
        return True


def _untrainable(norms: Iterable[nn.Module | None]) -> str:
    """Why these norms (copies of our own) are not BatchNorm in training mode, or ""."""
    for norm in norms:
        plain = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) if norm is not None else True
        if norm is None or plain or not hasattr(norm, "track_running_stats"):
            continue
        reason = f"{type(norm).__name__} does something else in training mode than BatchNorm"
        try:
            if not _trains_as_batch_norm(norm):
                return reason
        except Exception as error:
            return f"{reason}: {_one_line(error)}"
    return ""


def _trains_as_batch_norm(norm: Any) -> bool:
    """Runs a norm twice; compares the outputs, behind any activation, and the running statistics with torch's own."""
    norm.train()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = _grid().reshape(2, 1, 9, 10).repeat(1, norm.num_features, 1, 1)
    seen = int(norm.num_batches_tracked)
    for step in (1, 2):
        momentum = 1 / (seen + step) if norm.momentum is None else norm.momentum
        expected = nn.functional.batch_norm(x, mean, var, norm.weight, norm.bias, True, momentum, norm.eps)
        y = _run(norm, x)
        behind = (expected, expected.clamp(0, 6), expected.clamp(min=0))
        if not any(torch.allclose(y, e, rtol=0, atol=TOLERANCE) for e in behind):
            return False
    kept = ((norm.running_mean, mean), (norm.running_var, var))
    return int(norm.num_batches_tracked) == seen + 2 and all(torch.allclose(a, b, rtol=TOLERANCE) for a, b in kept)


def _copy(module: nn.Module, twins: dict[int, Any]) -> Any:
    """A fp64 CPU copy of a module tree: same classes and attributes, tensors of its own, no hooks, no fused forward.

    Not `copy.deepcopy`: that would copy what hooks and attributes refer to, down to whole trainers.
    """
    if id(module) in twins:
        return twins[id(module)]
    twin = twins[id(module)] = object.__new__(type(module))
    state = {name: v for name, v in vars(module).items() if not isinstance(v, FusedForward | FusedChain)}
    state.pop("_compiled_call_impl", None)
    state.update({name: OrderedDict() for name in _HOOKS})
    vars(twin).update(state)
    for store in ("_parameters", "_buffers"):
        vars(twin)[store] = {name: _to_fp64(t, twins) for name, t in state[store].items()}
    vars(twin)["_modules"] = {name: m if m is None else _copy(m, twins) for name, m in state["_modules"].items()}
    return twin


def _to_fp64(tensor: Tensor | None, twins: dict[int, Any]) -> Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in twins:
        dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
        if tensor.is_meta:
            copy = torch.ones(tensor.shape, dtype=dtype, device="cpu")
        else:
            copy = tensor.detach().to(device="cpu", dtype=dtype, copy=True)
        twins[id(tensor)] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
    return twins[id(tensor)]


def _randomise(block: nn.Module, layers: list[tuple[Any, Any]], generator: torch.Generator) -> None:
    """Values that let every layer matter and every channel of a hidden tensor meet its clamps somewhere.

    Hidden values are about N(3, 3^2) where a BatchNorm or bias follows. The BatchNorm's shifts are spread beyond both
    ends of the clamp, so that it is reached even behind a parametrized weight, whose scale is not ours to choose.
    """
    mine: set[int] = set()
    for conv, norm in layers:
        if conv is None:
            continue
        stores = [(conv, "weight"), (conv, "bias"), (norm, "weight"), (norm, "bias")]
        stores += [(norm, "running_mean"), (norm, "running_var")]
        values = [m and m._parameters.get(name, m._buffers.get(name)) for m, name in stores]
        mine.update(id(v) for v in values if v is not None)
        weight, *vectors = values
        if weight is not None:
            weight.normal_(0, 3 / weight[0].numel() ** 0.5, generator=generator)
        for vector, (low, high) in zip(vectors, ((0, 3), (1, 3), (-2, 9), (-1, 1), (4, 12)), strict=True):
            if vector is not None:
                vector.uniform_(low, high, generator=generator)
    for tensor in itertools.chain(block.parameters(), block.buffers()):
        if id(tensor) not in mine and tensor.is_floating_point():  # parametrizations keep sign and rough size
            tensor.mul_(torch.empty_like(tensor).uniform_(0.5, 1.5, generator=generator))


def _tensors(conv: Any, norm: Any) -> tuple[Tensor | None, ...]:
    layer = (None, None) if conv is None else (conv.weight, conv.bias)
    return layer + ((None,) * 4 if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
