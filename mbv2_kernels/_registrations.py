"""The torch ops of namespace mbv2, as torch sees them: schemas, fakes, autograd, autocast.

C++ (csrc/ops.cpp, CPU): `inverted_residual`, `pack_inverted_residual`, `inverted_residual_packed`; for the dense layers
around the blocks `conv_act`, `pack_conv`, `conv_act_packed` and `linear`; for runs of blocks and convolutions
`pack_chain`, `chain_packed` and, with mean and classifier behind them, `chain_classify`. Defined here:
`inverted_residual_bn` and `conv_bn_act`, the same with their BatchNorms unfolded, and `inverted_residual_backward`. The
packed ops, chains, `conv_act` and `linear` are for inference: they have no gradient.

What torch.compile looks through (the backward formulas) is made of plain operations around opaque ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, reference, training
from .backends import BlockConfig, LayerConfig
from .fold import BlockTensors, FoldedWeights, Layer, fold, fold_layer, fold_layer_backward, gradient_like

_LIBRARY = torch.library.Library(
    "mbv2", "FRAGMENT"
)  # lives as long as this module: its end would undo what is registered

_WEIGHTS = (
    "Tensor? w_expand, Tensor? b_expand, Tensor w_depthwise, Tensor? b_depthwise, Tensor w_project, Tensor? b_project"
)
_CONFIG = "int stride, int padding, int dilation, str activation, str final_activation, bool residual"
_BLOCK_TENSORS = ", ".join(
    f"Tensor{'' if field in ('depthwise_weight', 'project_weight') else '?'} {field}" for field in BlockTensors._fields
)
_N_BLOCK = len(BlockTensors._fields)
_N_CONFIG = len(BlockConfig._fields)
_LAYER = "Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var"
_N_LAYER = len(Layer._fields)

_LIBRARY.define(
    f"inverted_residual_bn(Tensor x, {_BLOCK_TENSORS}, float[] eps, {_CONFIG}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"inverted_residual_backward(Tensor grad, Tensor x, {_WEIGHTS}, {_CONFIG}, bool[7] needs)"
    f" -> ({', '.join(['Tensor'] * 7)})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"conv_bn_act(Tensor x, {_LAYER}, float eps, int stride, int padding, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_ops = torch.ops.mbv2


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def _inverted_residual_bn(x: Tensor, *args: Any) -> Tensor:
    tensors = BlockTensors(*args[:_N_BLOCK])
    eps, *config = args[_N_BLOCK:]
    if len(eps) != 3:
        raise ValueError(f"eps must be 3 numbers (expand, depthwise, project), got {len(eps)}")
    return backends.run_block(x, tensors, tuple(eps), BlockConfig(*config))


def _conv_bn_act(x: Tensor, *args: Any) -> Tensor:
    return backends.run_layer(x, Layer(*args[:_N_LAYER]), args[_N_LAYER], LayerConfig(*args[_N_LAYER + 1 :]))


def _inverted_residual_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weights, config, needs = FoldedWeights(*args[:6]), BlockConfig(*args[6:-1]), args[-1]
    # The phases have z in x's dtype, and rounded to 16 bits it is not what the forward's final activation saw.
    exact = config.final_activation == "none" or x.dtype is torch.float32
    if exact and backends.trains_with_kernels(x):
        grads = tuple(training.folded_backward(grad, x, weights, config, needs))
    else:
        grads = reference.inverted_residual_backward(grad, x, *weights, **config._asdict(), needs=tuple(needs))
    grad_x, *others = grads
    return (
        x.new_empty(0) if grad_x is None else backends.dense(grad_x, torch.channels_last),
        *(
            x.new_empty(0) if g is None or w is None else gradient_like(w, g)
            for g, w in zip(others, weights, strict=True)
        ),
    )


_LIBRARY.impl("inverted_residual_bn", _inverted_residual_bn, "CompositeExplicitAutograd")
_LIBRARY.impl("inverted_residual_backward", _inverted_residual_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("conv_bn_act", _conv_bn_act, "CompositeExplicitAutograd")
_LIBRARY.impl("inverted_residual", backends.inverted_residual_triton, "CUDA")


# ---- Fakes: shapes, dtypes and strides of the results ----------------------------------------------------------------


def _fake_output(x: Tensor, out_channels: int, kernel_size: int, config: BlockConfig) -> Tensor:
    geometry = (kernel_size, config.stride, config.padding, config.dilation)
    height, width = (reference.output_size(size, *geometry) for size in x.shape[2:])
    return torch.empty(
        (x.shape[0], out_channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


@torch.library.register_fake("mbv2::inverted_residual", lib=_LIBRARY)
def _(x: Tensor, *args: Any) -> Tensor:
    w_depthwise, w_project = args[2], args[4]
    return _fake_output(x, w_project.shape[0], w_depthwise.shape[-1], BlockConfig(*args[6:]))


@torch.library.register_fake("mbv2::inverted_residual_packed", lib=_LIBRARY)
def _(
    x: Tensor, packed: Tensor, hidden_channels: int, out_channels: int, kernel_size: int, expand: bool, *config: Any
) -> Tensor:
    return _fake_output(x, out_channels, kernel_size, BlockConfig(*config))


@torch.library.register_fake("mbv2::pack_inverted_residual", lib=_LIBRARY)
def _(*weights: Any) -> Tensor:
    # The layout, and so the length, is private to the tier that packs.
    return weights[2].new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)


def _fake_conv(x: Tensor, out_channels: int, kernel_size: int, stride: int, padding: int) -> Tensor:
    config = BlockConfig(stride, padding, 1, "none", "none", False)
    return _fake_output(x, out_channels, kernel_size, config)


@torch.library.register_fake("mbv2::conv_act", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str) -> Tensor:
    return _fake_conv(x, weight.shape[0], weight.shape[-1], stride, padding)


@torch.library.register_fake("mbv2::conv_act_packed", lib=_LIBRARY)
def _(
    x: Tensor, packed: Tensor, out_channels: int, kernel_size: int, stride: int, padding: int, activation: str
) -> Tensor:
    return _fake_conv(x, out_channels, kernel_size, stride, padding)


@torch.library.register_fake("mbv2::pack_chain", lib=_LIBRARY)
def _(packed: Sequence[Tensor], steps: Sequence[int]) -> Tensor:
    return packed[0].new_empty(1, dtype=torch.int64)


@torch.library.register_fake("mbv2::chain_packed", lib=_LIBRARY)
def _(x: Tensor, chain: Tensor) -> Tensor:
    # What the chain computes is not written in `chain`.
    sizes = [torch.library.get_ctx().new_dynamic_size() for _ in range(3)]
    return torch.empty((x.shape[0], *sizes), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("mbv2::chain_classify", lib=_LIBRARY)
def _(x: Tensor, chain: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("mbv2::linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("mbv2::pack_conv", lib=_LIBRARY)
def _(weight: Tensor, bias: Tensor | None, tier: str | None = None) -> Tensor:
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)


@torch.library.register_fake("mbv2::conv_bn_act", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    stride, padding, _ = args[_N_LAYER:]
    return _fake_conv(x, weight.shape[0], weight.shape[-1], stride, padding)


@torch.library.register_fake("mbv2::inverted_residual_bn", lib=_LIBRARY)
def _(x: Tensor, *args: Any) -> Tensor:
    tensors = BlockTensors(*args[:_N_BLOCK])
    config = BlockConfig(*args[_N_BLOCK + 1 :])
    return _fake_output(x, tensors.project_weight.shape[0], tensors.depthwise_weight.shape[-1], config)


def _fake_gradients(x: Tensor, parameters: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Of x in channels_last, of parameters in their own strides; [0] where `needs` is False."""
    leaves = (torch.empty_like(x, memory_format=torch.channels_last), *parameters)
    return tuple(
        torch.empty_like(leaf) if needed and leaf is not None else x.new_empty(0)
        for leaf, needed in zip(leaves, needs, strict=True)
    )


@torch.library.register_fake("mbv2::inverted_residual_backward", lib=_LIBRARY)
def _(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(x, args[:6], args[-1])


# ---- Autograd --------------------------------------------------------------------------------------------------------


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """For `mbv2::inverted_residual` and `InvertedResidualFunction`: keeps x and the weights, nothing of the inside."""
    ctx.save_for_backward(*inputs[:7])
    ctx.config = BlockConfig(*inputs[7:])


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for x and the six weights, None for the rest."""
    needs = ctx.needs_input_grad[:7]
    grads = _ops.inverted_residual_backward(grad, *ctx.saved_tensors, *ctx.config, needs)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *(None,) * _N_CONFIG


def _setup_context_bn(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: 1 + _N_BLOCK])
    ctx.eps = tuple(inputs[1 + _N_BLOCK])
    ctx.config = BlockConfig(*inputs[2 + _N_BLOCK :])


def _backward_bn(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *block = ctx.saved_tensors
    tensors = BlockTensors(*block)
    need_x, *needs = ctx.needs_input_grad[: 1 + _N_BLOCK]
    # Of each layer: needed for weight, bias, gamma, beta. The running statistics are not learned.
    layer_needs = [needs[first : first + 4] for first in (0, 6, 12)]
    folded_needs = [need_x]
    for weight, bias, gamma, beta in layer_needs:
        folded_needs += [weight or gamma, bias or gamma or beta]
    folded = fold(tensors, ctx.eps)
    grad_x, *folded_grads = _ops.inverted_residual_backward(grad, x, *folded, *ctx.config, folded_needs)
    grads = [grad_x if need_x else None]
    for i, (layer, needed) in enumerate(zip(tensors.layers(), layer_needs, strict=True)):
        if layer is None:
            grads += [None] * 6
        else:
            grad_weight, grad_bias = folded_grads[2 * i : 2 * i + 2]
            grads += [*fold_layer_backward(grad_weight, grad_bias, layer, ctx.eps[i], needed), None, None]
    return *grads, *(None,) * (1 + _N_CONFIG)


def _setup_context_layer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: 1 + _N_LAYER])
    ctx.eps = inputs[1 + _N_LAYER]
    ctx.config = LayerConfig(*inputs[2 + _N_LAYER :])


def _backward_layer(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    layer = Layer(*tensors)
    need_x, weight, bias, gamma, beta, *_ = ctx.needs_input_grad
    folded_needs = (need_x, weight or gamma, bias or gamma or beta)
    grad_x, grad_weight, grad_bias = reference.conv_act_backward(
        grad, x, *fold_layer(layer, ctx.eps), **ctx.config._asdict(), needs=folded_needs
    )
    grads = fold_layer_backward(grad_weight, grad_bias, layer, ctx.eps, (weight, bias, gamma, beta))
    return grad_x, *grads, None, None, *(None,) * (1 + len(ctx.config))


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "mbv2_kernels: a fused block is differentiable once; for a gradient of its gradient run the block unfused "
        "(mbv2_kernels.unfuse) or use mbv2_kernels.reference.inverted_residual"
    )


torch.library.register_autograd("mbv2::inverted_residual", backward, setup_context=setup_context, lib=_LIBRARY)
torch.library.register_autograd(
    "mbv2::inverted_residual_bn", _backward_bn, setup_context=_setup_context_bn, lib=_LIBRARY
)
torch.library.register_autograd("mbv2::conv_bn_act", _backward_layer, setup_context=_setup_context_layer, lib=_LIBRARY)
torch.library.register_autograd("mbv2::inverted_residual_backward", _no_double_backward, lib=_LIBRARY)


# ---- Autocast --------------------------------------------------------------------------------------------------------

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _autocast(op: Callable[..., Tensor], device_type: str, convolutions: Sequence[int]) -> Callable[..., Tensor]:
    """`op` under autocast's rule for convolutions: x in autocast's dtype, and the result in that.

    `convolutions`: which arguments after x are convolution weights and biases. Those in float32 stay: whatever a kernel
    rounds, it rounds from the float32 masters. float64 is left alone, as autocast does.
    A residual is added to the x that came: float32 + bfloat16 is float32, as in the unfused block.
    """

    def kernel(x: Tensor, *given: Any) -> Tensor:
        args, dtype = list(given), torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            if x.dtype is torch.float64:
                return op(x, *args)
            for i in convolutions:
                if args[i] is not None and args[i].dtype not in (torch.float32, torch.float64):
                    args[i] = args[i].to(dtype)
            if args[-1] is True and x.dtype is not dtype:  # a block's last argument is `residual`
                return op(x.to(dtype), *args[:-1], False) + x
            return op(x.to(dtype), *args)

    return kernel


def _without_autocast(op: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return op(*args)

    return kernel


for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _name, _convolutions in (
        ("inverted_residual", range(6)),
        ("inverted_residual_bn", (0, 1, 6, 7, 12, 13)),
        ("inverted_residual_packed", ()),
        ("conv_act", (0, 1)),
        ("conv_act_packed", ()),
        ("conv_bn_act", (0, 1)),
    ):
        _LIBRARY.impl(_name, _autocast(getattr(_ops, _name).default, _device_type, _convolutions), _key)
    _LIBRARY.impl("inverted_residual_backward", _without_autocast(_ops.inverted_residual_backward.default), _key)
