"""The ops of a training step, as torch sees them: `train_block` and `train_layer`, their backward, and the phases.

`mbv2::train_block` is the whole forward of a block with batch statistics (`training.forward`), `mbv2::train_layer` that
of a stem or head. Autograd, torch.compile and autocast meet these ops and their backward; the phases they are made of
(`mbv2::train_gram`, ...) are run below them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends, training
from ._registrations import (
    _AUTOCAST_KEYS,
    _BLOCK_TENSORS,
    _CONFIG,
    _LIBRARY,
    _N_BLOCK,
    _N_CONFIG,
    _fake_conv,
    _fake_gradients,
    _fake_output,
    _no_double_backward,
    _without_autocast,
)
from .backends import BlockConfig, LayerConfig
from .fold import BlockTensors, Layer
from .training import Saved, SavedLayer, Step

_BLOCK = f"{_BLOCK_TENSORS}, float[] eps, {_CONFIG}, bool[3] batch, str[] groups, bool keep"
_SAVED = ", ".join(f"Tensor {field}" for field in Saved._fields)
_N_KEPT = 1 + _N_BLOCK + len(Saved._fields)
_N_LEARNED = 13  # x, and weight, bias, gamma, beta of three layers
_LAYER = (
    "Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, float eps, int stride, int padding, str activation, "
    "str group"
)
_SAVED_LAYER = ", ".join(f"Tensor {field}" for field in SavedLayer._fields)
_N_LAYER_LEARNED = 5  # x, weight, bias, gamma, beta
_ops = torch.ops.mbv2

# Returns y and `Saved`; `batch`, `groups`, `keep` are `training.Step`.
_LIBRARY.define(
    f"train_block(Tensor x, {_BLOCK}) -> (Tensor y, {_SAVED})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"train_block_backward(Tensor grad, Tensor x, {_BLOCK}, {_SAVED}, bool[{_N_LEARNED}] needs)"
    f" -> ({', '.join(['Tensor'] * _N_LEARNED)})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# `group`: the name of the process group that shares the batch's statistics, or "".
_LIBRARY.define(
    f"train_layer(Tensor x, {_LAYER}) -> (Tensor y, {_SAVED_LAYER})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"train_layer_backward(Tensor grad, Tensor x, {_LAYER}, {_SAVED_LAYER}, bool[{_N_LAYER_LEARNED}] needs)"
    f" -> ({', '.join(['Tensor'] * _N_LAYER_LEARNED)})",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _read(args: tuple[Any, ...]) -> tuple[BlockTensors, tuple[float, float, float], BlockConfig, Step, tuple[Any, ...]]:
    """The arguments after x: the block as `training` takes it, and the rest."""
    tensors = BlockTensors(*args[:_N_BLOCK])
    eps, *others = args[_N_BLOCK:]
    if len(eps) != 3 or len(others[_N_CONFIG + 1]) != 3:
        raise ValueError(f"eps and groups must be 3 each (expand, depthwise, project), got {eps}, {others[-2]}")
    end = _N_CONFIG + len(Step._fields)
    step = Step(*others[_N_CONFIG:end])
    return tensors, tuple(eps), BlockConfig(*others[:_N_CONFIG]), step, tuple(others[end:])


def _read_layer(args: tuple[Any, ...]) -> tuple[Layer, float, LayerConfig, str, tuple[Any, ...]]:
    """The same for a layer."""
    weight, bias, gamma, beta, eps, stride, padding, activation, group, *rest = args
    return (
        Layer(weight, bias, gamma, beta, None, None),
        eps,
        LayerConfig(stride, padding, activation),
        group,
        tuple(rest),
    )


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def _train_block(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, eps, config, step, _ = _read(args)
    y, saved, _ = training.forward(x, tensors, eps, config, step)
    return y, *saved


def _train_block_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if g is None else g for g in _block_gradients(grad, x, *args))


def _block_gradients(grad: Tensor, x: Tensor, *args: Any, e: Tensor | None = None) -> list[Tensor | None]:
    tensors, eps, config, step, rest = _read(args)
    saved, needs = Saved(*rest[:-1]), rest[-1]
    if len(needs) != _N_LEARNED:
        raise ValueError(f"needs must be {_N_LEARNED} (x, and four of each layer), got {len(needs)}")
    return training.backward(grad, x, tensors, eps, config, step, saved, needs, e=e)


def _train_layer(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    layer, eps, config, group, _ = _read_layer(args)
    y, saved = training.layer_forward(x, layer, eps, config, group)
    return y, *saved


def _train_layer_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if g is None else g for g in _layer_gradients(grad, x, *args))


def _layer_gradients(grad: Tensor, x: Tensor, *args: Any) -> list[Tensor | None]:
    layer, eps, config, group, (*saved, needs) = _read_layer(args)
    if len(needs) != _N_LAYER_LEARNED:
        raise ValueError(f"needs must be {_N_LAYER_LEARNED} (x, and four of the layer), got {len(needs)}")
    return training.layer_backward(grad, x, layer, eps, config, group, SavedLayer(*saved), needs)


_LIBRARY.impl("train_layer", _train_layer, "CompositeExplicitAutograd")
_LIBRARY.impl("train_layer_backward", _train_layer_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("train_block", _train_block, "CompositeExplicitAutograd")
_LIBRARY.impl("train_block_backward", _train_block_backward, "CompositeExplicitAutograd")
for _phase in backends.PHASES:
    _LIBRARY.impl(_phase, functools.partial(backends.run_triton_phase, _phase), "CUDA")


# ---- Fakes -----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("mbv2::train_block", lib=_LIBRARY)
def _(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, _, config, step, _ = _read(args)
    kernel_size = tensors.depthwise_weight.shape[-1]
    hidden_channels, out_channels = tensors.depthwise_weight.shape[0], tensors.project_weight.shape[0]
    in_channels = x.shape[1]
    d = _fake_output(x, hidden_channels, kernel_size, config) if step.keep else x.new_empty(0)
    y, z = (_fake_output(x, out_channels, kernel_size, config) for _ in range(2))
    none = x.new_empty(0, dtype=torch.float64)
    expand = step.batch[0] and tensors.expand_weight is not None
    saved = Saved(
        d,
        z,
        none.new_empty(3, hidden_channels) if expand else none.clone(),
        none.new_empty(3, hidden_channels) if step.batch[1] else none.clone(),
        none.new_empty(3, out_channels) if step.batch[2] else none.clone(),
        none.new_empty(in_channels) if expand else none.clone(),
        none.new_empty(in_channels) if expand else none.clone(),
        none.new_empty(in_channels, in_channels) if expand else none.clone(),
    )
    return y, *saved


@torch.library.register_fake("mbv2::train_block_backward", lib=_LIBRARY)
def _(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(x, _leaves(x, args)[1:], args[-1])


@torch.library.register_fake("mbv2::train_layer", lib=_LIBRARY)
def _(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    layer, _, config, _, _ = _read_layer(args)
    channels, kernel_size = layer.weight.shape[0], layer.weight.shape[-1]
    y = _fake_conv(x, channels, kernel_size, config.stride, config.padding)
    statistics = x.new_empty(3, channels, dtype=torch.float64)
    if training.is_pointwise(layer.weight, config):
        return y, torch.empty_like(y), statistics, *(_sums(x, 0) for _ in range(3))
    depth = layer.weight[0].numel()
    return y, x.new_empty(0), statistics, _sums(x, depth), _sums(x, depth), statistics.new_empty(depth, depth)


@torch.library.register_fake("mbv2::train_layer_backward", lib=_LIBRARY)
def _(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(x, args[:4], args[-1])


def _leaves(x: Tensor, block: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """What has a gradient: x, and weight, bias, gamma, beta of each layer."""
    return x, *block[0:4], *block[6:10], *block[12:16]


@torch.library.register_fake("mbv2::train_gram", lib=_LIBRARY)
def _(x: Tensor) -> tuple[Tensor, ...]:
    channels = x.shape[1]
    return _sums(x, channels), x.new_empty(channels, channels, dtype=torch.float64)


@torch.library.register_fake("mbv2::train_depthwise", lib=_LIBRARY)
def _(x: Tensor, w1: Tensor | None, b1: Tensor | None, wd: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *config, keep = args
    channels = wd.shape[0]
    d = _fake_image(x, channels, wd, config) if keep else x.new_empty(0)
    return d, _sums(x, channels), _sums(x, channels)


@torch.library.register_fake("mbv2::train_project", lib=_LIBRARY)
def _(x: Tensor, d: Tensor | None, w1: Tensor | None, b1: Tensor | None, wd: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _, _, w2, *config = args
    channels = w2.shape[0]
    return _fake_image(x, channels, wd, config), _sums(x, channels), _sums(x, channels)


@torch.library.register_fake("mbv2::train_finish", lib=_LIBRARY)
def _(z: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(z, memory_format=torch.channels_last)


@torch.library.register_fake("mbv2::train_finish_backward", lib=_LIBRARY)
def _(gy: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _sums(gy, gy.shape[1]), _sums(gy, gy.shape[1])


@torch.library.register_fake("mbv2::train_project_backward", lib=_LIBRARY)
def _(*args: Any) -> tuple[Tensor, ...]:
    x, w2, (need_w2, need_sums) = args[8], args[15], args[-1]
    hidden = w2.shape[1]
    gw2 = w2.new_empty(w2.shape) if need_w2 else w2.new_empty(0)
    return gw2, *(_sums(x, hidden if need_sums else 0) for _ in range(2))


@torch.library.register_fake("mbv2::train_depthwise_backward", lib=_LIBRARY)
def _(*args: Any) -> tuple[Tensor, ...]:
    x, w1, wd, (need_x, need_wd) = args[8], args[10], args[12], args[-1]
    expand = need_x and w1 is not None
    return (
        torch.empty_like(x, dtype=wd.dtype, memory_format=torch.channels_last) if need_x else wd.new_empty(0),
        wd.new_empty(wd.shape if need_wd else 0),
        wd.new_empty(w1.shape if expand else 0),
        _sums(x, wd.shape[0] if expand else 0),
    )


@torch.library.register_fake("mbv2::train_input_backward", lib=_LIBRARY)
def _(g: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.register_fake("mbv2::train_pointwise", lib=_LIBRARY)
def _(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    channels = w.shape[0]
    return _fake_conv(x, channels, 1, 1, 0), _sums(x, channels), _sums(x, channels)


@torch.library.register_fake("mbv2::train_pointwise_backward", lib=_LIBRARY)
def _(*args: Any) -> tuple[Tensor, ...]:
    *_, x, w, (need_w, need_x) = args
    gx = torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0)
    return w.new_empty(w.shape if need_w else 0), gx


@torch.library.register_fake("mbv2::train_window_gram", lib=_LIBRARY)
def _(x: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, ...]:
    depth = x.shape[1] * kernel_size**2
    return _sums(x, depth), x.new_empty(depth, depth, dtype=torch.float64)


@torch.library.register_fake("mbv2::train_window_backward", lib=_LIBRARY)
def _(gy: Tensor, x: Tensor, w1: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return w1.new_empty(len(w1), w1[0].numel()), _sums(x, len(w1))


@torch.library.register_fake("mbv2::train_statistics", lib=_LIBRARY)
def _(total: Tensor, *_: Any) -> Tensor:
    return total.new_empty(3, len(total))


@torch.library.register_fake("mbv2::train_linear_statistics", lib=_LIBRARY)
def _(weight: Tensor, sum_x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return sum_x.new_empty(3, len(weight)), torch.empty_like(sum_x)


@torch.library.register_fake("mbv2::train_norm", lib=_LIBRARY)
def _(statistics: Tensor, gamma: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(gamma), torch.empty_like(gamma)


@torch.library.register_fake("mbv2::train_fold_expand", lib=_LIBRARY)
def _(weight: Tensor, statistics: Tensor, gamma: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(weight), torch.empty_like(gamma)


@torch.library.register_fake("mbv2::train_norm_backward", lib=_LIBRARY)
def _(statistics: Tensor, gamma: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(gamma) for _ in range(6))


@torch.library.register_fake("mbv2::train_linear_sums", lib=_LIBRARY)
def _(weight: Tensor, t: Tensor) -> Tensor:
    return _sums(weight, len(weight))


@torch.library.register_fake("mbv2::train_expand_backward", lib=_LIBRARY)
def _(weight: Tensor, w1: Tensor, statistics: Tensor, gamma: Tensor, *_: Any) -> tuple[Tensor, ...]:
    in_channels = weight.shape[1] if statistics.shape[0] == 3 else 0
    m = weight.new_empty((in_channels, in_channels) if in_channels else 0)
    return torch.empty_like(weight), *(torch.empty_like(gamma) for _ in range(3)), m, weight.new_empty(in_channels)


def _fake_image(x: Tensor, channels: int, wd: Tensor, config: list[Any]) -> Tensor:
    stride, padding, dilation, activation = config
    return _fake_output(x, channels, wd.shape[-1], BlockConfig(stride, padding, dilation, activation, "none", False))


def _sums(x: Tensor, channels: int) -> Tensor:
    return x.new_empty(channels, dtype=torch.float64)


# ---- Autograd --------------------------------------------------------------------------------------------------------


def is_plain(tensor: Tensor) -> bool:
    """Whether nobody has to see an op on it pass through the dispatcher, which costs as much as a small phase."""
    return (
        type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(tensor.device.type)
        and torch._C._get_tracing_state() is None
    )


def _is_last_derivative(grad: Tensor) -> bool:
    """Whether no second one can follow: the ops of the backward are there to refuse it."""
    return is_plain(grad) and not torch.is_grad_enabled()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: 1 + _N_BLOCK], *saved)
    ctx.block = inputs[1 + _N_BLOCK :]


def _keep_e(ctx: Any, e: Tensor | None) -> None:
    """After `_setup_context`: `_backward` finds it behind the rest."""
    if e is not None:
        ctx.save_for_backward(*ctx.to_save, e)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    learned = _leaves(ctx.needs_input_grad[0], ctx.needs_input_grad[1:])
    grads: Any = [None] * _N_LEARNED
    if grad is not None:
        kept = ctx.saved_tensors  # once: checkpointing computes them anew at every access
        inputs, saved, e = kept[: 1 + _N_BLOCK], kept[1 + _N_BLOCK : _N_KEPT], kept[_N_KEPT:]
        if _is_last_derivative(grad):
            grads = _block_gradients(grad, *inputs, *ctx.block, *saved, learned, e=e[0] if e else None)
        else:
            grads = _ops.train_block_backward(grad, *inputs, *ctx.block, *saved, learned)
            grads = [g if need else None for g, need in zip(grads, learned, strict=True)]
    grad_x, *rest = grads
    layers = (grad for i in (0, 4, 8) for grad in (*rest[i : i + 4], None, None))
    return grad_x, *layers, *(None,) * len(ctx.block)


def _setup_layer_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_N_LAYER_LEARNED], *saved)
    ctx.layer = inputs[_N_LAYER_LEARNED:]


def _layer_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    learned = ctx.needs_input_grad[:_N_LAYER_LEARNED]
    grads: Any = [None] * _N_LAYER_LEARNED
    if grad is not None:
        kept = ctx.saved_tensors
        inputs, saved = kept[:_N_LAYER_LEARNED], kept[_N_LAYER_LEARNED:]
        if _is_last_derivative(grad):
            grads = _layer_gradients(grad, *inputs, *ctx.layer, *saved, learned)
        else:
            grads = _ops.train_layer_backward(grad, *inputs, *ctx.layer, *saved, learned)
            grads = [g if need else None for g, need in zip(grads, learned, strict=True)]
    return *grads, *(None,) * len(ctx.layer)


torch.library.register_autograd("mbv2::train_block", _backward, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd("mbv2::train_layer", _layer_backward, setup_context=_setup_layer_context, lib=_LIBRARY)
torch.library.register_autograd("mbv2::train_layer_backward", _no_double_backward, lib=_LIBRARY)
torch.library.register_autograd("mbv2::train_block_backward", _no_double_backward, lib=_LIBRARY)


class TrainBlockFunction(torch.autograd.Function):
    """The op `mbv2::train_block` on plain eager tensors, without the dispatcher's way through its autograd.

    It may keep e as well, which that op has no place for.
    Without a `setup_context` of its own: for one, `apply` works out the signature of `forward` in every call.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        tensors, eps, config, step, _ = _read(args)
        y, saved, e = training.forward(x, tensors, eps, config, step, keep_e=True)
        output = (y, *saved)
        _setup_context(ctx, (x, *args), output)
        _keep_e(ctx, e)
        return output

    backward = staticmethod(_backward)


class TrainLayerFunction(torch.autograd.Function):
    """The same for `mbv2::train_layer`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        output = _train_layer(x, *args)
        _setup_layer_context(ctx, (x, *args), output)
        return output

    backward = staticmethod(_layer_backward)


# ---- Autocast --------------------------------------------------------------------------------------------------------


def _autocast(op: Callable[..., Any], device_type: str, residual: int | None) -> Callable[..., Any]:
    """`op` as autocast has it for convolutions: x in autocast's dtype, and the result in that.

    Weights in float32 stay, see `_registrations._autocast`. `residual`: where after x a flag stands that asks for it.
    It is added to the x that came.
    """

    def kernel(x: Tensor, *args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            if x.dtype in (dtype, torch.float64):
                return op(x, *args)
            if residual is None or not args[residual]:
                return op(x.to(dtype), *args)
            y, *saved = op(x.to(dtype), *args[:residual], False, *args[residual + 1 :])
            return y + x, *saved

    return kernel


for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _name, _residual in (("train_block", _N_BLOCK + _N_CONFIG), ("train_layer", None)):
        _backward_op = getattr(_ops, f"{_name}_backward").default
        _LIBRARY.impl(_name, _autocast(getattr(_ops, _name).default, _device_type, _residual), _key)
        _LIBRARY.impl(f"{_name}_backward", _without_autocast(_backward_op), _key)
