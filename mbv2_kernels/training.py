"""A block, or a dense layer, with batch statistics, forward and backward: a chain of phases and arithmetic between.

A phase sweeps over images. Between two phases stands arithmetic on vectors [channels], in float64, where it rounds
nothing. `backends.train_phases` picks who computes both, `training_reference` says what they compute. With
SyncBatchNorm the sums that a phase gives are added up over all processes in between. Without it one op runs a block's
whole chain on CPUs (csrc/train_ops.cpp): whatever is changed here is changed there.

A convolution's output v, without its bias, goes through a BatchNorm as v * scale + shift; the way back is

    gv = a * g + b * v + c      a = scale,  b = -scale * invstd * S2 / P,  c = -scale * S1 / P - b * mean

with P pixels, S1 = sum(g) the gradient of beta, S2 = invstd * (sum(g * v) - mean * S1) that of gamma; b = c = 0 where
the statistics are fixed. The next phase applies it element by element. The expand layer needs no such phase: there
v = W1 x is linear in x, so mean, variance and the whole way back follow from sum(x), sum(x xᵀ) and T = sum(g xᵀ):

    mean = W1 mean(x)    variance = diag(W1 cov(x) W1ᵀ)    sum(g * v) = rowdot(W1, T)
    gx  = W1ᵀ (a * g) + W1ᵀ diag(b) W1 x + W1ᵀ c
    gW1 = a * T + b * (W1 sum(x xᵀ)) + c sum(x)ᵀ

The first term of gx and T come out of one sweep, before S1 and S2 are known: a second one is saved.

A stem is linear as well, in the windows p that it sees of the picture. All of the above holds with p for x, but for gx,
and p has few elements: so nothing is kept for the backward. A head keeps z and goes the other way: its Gram matrix is
so large that the products with it would cost more than those of the convolution itself.

Vectors reach the phases in float32. The rounding of a scale would be the same error at every pixel, and sums over
pixels, most of all those that should vanish, would show it: so a shift is always computed from the rounded scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, reference
from .backends import BlockConfig, LayerConfig
from .fold import NO_EPS, BlockTensors, Eps, FoldedWeights, Layer, check_shapes, gradient_like
from .reference import _convolution_backward, _pads


class Step(NamedTuple):
    """How the three layers of a block (expand, depthwise, project) take part in a training step.

    batch: the layer uses batch statistics; else its running statistics, or it has no BatchNorm.
    groups: names of the process groups that share the batch's statistics; "": this process alone.
    keep: keep d, the depthwise convolution's output, for the backward; else it is computed again.
    """

    batch: Sequence[bool]
    groups: Sequence[str]
    keep: bool


class Saved(NamedTuple):
    """What the forward leaves for the backward, beside x and the parameters. A tensor [0]: not there.

    The statistics, of layers that use the batch's, are float64 [3, channels]: mean and biased variance of the
    convolution's output without its bias, and the number of pixels behind them. If expand uses them: x's mean over the
    same pixels, and the sums over this process' own x and x xᵀ, float64 [Cin], [Cin] and [Cin, Cin].
    """

    d: Tensor
    z: Tensor
    expand_statistics: Tensor
    depthwise_statistics: Tensor
    project_statistics: Tensor
    mean_x: Tensor
    sum_x: Tensor
    gram: Tensor


class SavedLayer(NamedTuple):
    """The same for a dense layer, whose windows p stand for x: sums over p and p pᵀ, float64 [Cin k k] and its square.

    A 1x1 convolution has z and statistics alone, others all but z.
    """

    z: Tensor
    statistics: Tensor
    mean_x: Tensor
    sum_x: Tensor
    gram: Tensor


class _Linear(NamedTuple):
    """Of `Saved`, what belongs to a layer whose statistics follow from its input's."""

    statistics: Tensor
    mean_x: Tensor
    sum_x: Tensor
    gram: Tensor


class _Norm(NamedTuple):
    """A layer's BatchNorm as the functions between the phases take it.

    statistics: float64 [3, channels] of `Saved`, or fixed ones [2, channels], which are mean and variance of the
    convolution's output without its bias. gamma, beta: [channels], in the dtype that the phases compute in.
    """

    statistics: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float

    @property
    def fixed(self) -> bool:
        return self.statistics.shape[0] == 2


def forward(
    x: Tensor, tensors: BlockTensors, eps: Eps, config: BlockConfig, step: Step, *, keep_e: bool = False
) -> tuple[Tensor, Saved, Tensor | None]:
    """The block's output [N, Cout, Ho, Wo] in x's dtype, channels_last, and what its backward needs.

    Running statistics of layers with `step.batch` are neither read nor changed; they may be None.

    keep_e: e, what the depthwise convolution reads, may come as the third, where keeping it is worth its memory:
    float32 [N, C, H, W] of a block with many input channels on CPUs, if d is kept. The backward can do without.
    """
    phases = backends.train_phases(x, tensors)
    whole = getattr(phases, "train_block_forward", None)
    if whole is not None and not any(step.groups):
        y, *saved, e = whole(x, *tensors, eps, *config, step.batch, step.keep, keep_e)
        return y, Saved(*saved), e if e.dim() == 4 else None
    x = _channels_last(x)
    expand, depthwise, project = tensors.layers()
    convolution = config[:4]
    nothing = (x.new_empty(0, dtype=torch.float64) for _ in range(6))
    statistics1, statistics2, statistics3, mean_x, sum_x, gram = nothing

    if expand is not None and step.batch[0]:
        sum_x, gram = phases.train_gram(x)
        weight, sums = _matrix(expand, x), _all_reduce((sum_x, gram, _pixels(x)), step.groups[0])
        statistics1, mean_x = phases.train_linear_statistics(weight, *sums)
    w1, b1 = _folded_expand(phases, expand, eps[0], statistics1, mean_x, x)
    wd, w2 = _kernel_weight(depthwise, x), _matrix(project, x)

    # d is kept until z is there in lean memory too: one block's d for a moment costs less than computing it again.
    d, total, squares = phases.train_depthwise(x, w1, b1, wd, *convolution, True)
    if step.batch[1]:
        statistics2 = phases.train_statistics(*_all_reduce((total, squares, _pixels(d)), step.groups[1]))
    scale2, shift2 = phases.train_norm(*_norm(depthwise, eps[1], statistics2, x))

    z, total, squares = phases.train_project(x, d, w1, b1, wd, scale2, shift2, w2, *convolution)
    if step.batch[2]:
        statistics3 = phases.train_statistics(*_all_reduce((total, squares, _pixels(z)), step.groups[2]))
    scale3, shift3 = phases.train_norm(*_norm(project, eps[2], statistics3, x))

    y = phases.train_finish(z, x if config.residual else None, scale3, shift3, config.final_activation)
    d = d if step.keep else x.new_empty(0)
    return y, Saved(d, z, statistics1, statistics2, statistics3, mean_x, sum_x, gram), None


def backward(
    grad: Tensor,
    x: Tensor,
    tensors: BlockTensors,
    eps: Eps,
    config: BlockConfig,
    step: Step,
    saved: Saved,
    needs: Sequence[bool],
    *,
    e: Tensor | None = None,
    rounded: bool = True,
) -> list[Tensor | None]:
    """Gradients of x, and of weight, bias, gamma and beta of the three layers: 13, None where `needs` is False.

    Each has the dtype of what it is the gradient of, and x's is channels_last, the others have the strides of their
    parameters. `e`: what `forward` gave. `rounded`: where d was not kept, the forward had it in x's dtype,
    and the same values must meet the clamps again.
    """
    phases = backends.train_phases(x, tensors)
    whole = getattr(phases, "train_block_gradients", None)
    if whole is not None and not any(step.groups):
        kept_e = x.new_empty(0) if e is None else e
        found = whole(grad, x, *tensors, eps, *config, *saved, kept_e, needs, rounded)
        grads: list[Tensor | None] = [None if g.shape == (0,) else g for g in found]
        return _for_leaves(grads, _learned(tensors), needs)
    x, grad = _channels_last(x), _channels_last(grad)
    expand, depthwise, project = tensors.layers()
    convolution = config[:4]
    need_x, need1, need2, need3 = needs[0], needs[1:5], needs[5:9], needs[9:13]
    need_below_depthwise = need_x or any(need1)
    need_below_project = need_below_depthwise or any(need2)
    grads = [None] * 13

    w1, b1 = _folded_expand(phases, expand, eps[0], saved.expand_statistics, saved.mean_x, x)
    wd, w2 = _kernel_weight(depthwise, x), _matrix(project, x)
    norm2 = _norm(depthwise, eps[1], saved.depthwise_statistics, x)
    norm3 = _norm(project, eps[2], saved.project_statistics, x)
    scale2, shift2 = phases.train_norm(*norm2)
    scale3, shift3 = phases.train_norm(*norm3)

    through3 = _through_fixed(scale3)
    if any(need3[1:]) or (not norm3.fixed and (need_below_project or need3[0])):
        sums = phases.train_finish_backward(grad, saved.z, scale3, shift3, config.final_activation)
        *through3, grads[10], grads[11], grads[12] = _through(phases, norm3, sums, step.groups[2])
    if need_below_project or need3[0]:
        from_z = (grad, saved.z, scale3, shift3, *through3, config.final_activation)
        d = saved.d if saved.d.dim() == 4 else None
        if d is None and rounded:
            d, *_ = phases.train_depthwise(x, w1, b1, wd, *convolution, True)
        to_d = (x, d, w1, b1, wd, scale2, shift2)

        through2 = _through_fixed(scale2)
        need_sums = any(need2[1:]) or (not norm2.fixed and (need_below_depthwise or need2[0]))
        if need3[0] or need_sums:
            grads[9], *sums = phases.train_project_backward(*from_z, *to_d, w2, *convolution, (need3[0], need_sums))
            if need_sums:
                *through2, grads[6], grads[7], grads[8] = _through(phases, norm2, sums, step.groups[1])
        if need_below_depthwise or need2[0]:
            g, grads[5], t, sum_g = phases.train_depthwise_backward(
                *from_z, *to_d, *through2, w2, *convolution, (need_below_depthwise, need2[0])
            )
            if need_below_depthwise:
                m = c0 = None
                if expand is not None:
                    linear = _Linear(saved.expand_statistics, *saved[5:])
                    sums = _linear_sums(phases, linear, expand, t, sum_g, step.groups[0], x)
                    *grads[1:5], m, c0 = _linear_backward(phases, linear, expand, eps[0], w1, t, sums, x)
                plain = m is None and not config.residual and g.dtype is x.dtype  # then g is the gradient of x
                if need_x and plain:
                    grads[0] = g
                elif need_x:
                    grads[0] = phases.train_input_backward(g, x, m, c0, grad if config.residual else None)
    return _for_leaves(grads, _learned(tensors), needs)


def folded_backward(
    grad: Tensor, x: Tensor, weights: FoldedWeights, config: BlockConfig, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `inverted_residual` for x and the six folded weights: 7, None where `needs` is False.

    The same phases with nothing to normalise. Nothing of the forward is stored: d is computed again, unrounded as the
    kernel of the forward had it, and so is z where a final activation asks for it.
    """
    if len(needs) != 7:
        raise ValueError(f"needs must be 7 (x and six weights), got {len(needs)}")
    tensors = BlockTensors.from_folded(weights)
    check_shapes(tensors)
    none = x.new_empty(0)
    z = grad
    if config.final_activation != "none":
        phases = backends.train_phases(x, tensors)
        _, depthwise, project = tensors.layers()
        w1, b1 = _folded_expand(phases, tensors.layers()[0], 0.0, none, none, x)
        wd, w2 = _kernel_weight(depthwise, x), _matrix(project, x)
        scale2, shift2 = phases.train_norm(*_norm(depthwise, 0.0, none, x))
        z, *_ = phases.train_project(x, None, w1, b1, wd, scale2, shift2, w2, *config[:4])
    step = Step((False,) * 3, ("",) * 3, False)
    saved = Saved(none, z, *(none,) * 6)
    need_x, *rest = needs
    learned = [need for i in (0, 2, 4) for need in (rest[i], rest[i + 1], False, False)]
    grads = backward(grad, x, tensors, NO_EPS, config, step, saved, (need_x, *learned), rounded=False)
    return [grads[i] for i in (0, 1, 2, 5, 6, 9, 10)]


def layer_forward(x: Tensor, layer: Layer, eps: float, config: LayerConfig, group: str) -> tuple[Tensor, SavedLayer]:
    """A dense convolution, its BatchNorm with the batch's statistics, its activation; and what its backward needs.

    y [N, Cout, Ho, Wo] in x's dtype, channels_last. group: as in `Step`. The running statistics may be None.
    """
    phases = backends.train_layer_phases(x, layer)
    nothing = (x.new_empty(0, dtype=torch.float64) for _ in range(3))
    if is_pointwise(layer.weight, config):
        z, *sums = phases.train_pointwise(x, _matrix(layer, x))
        statistics = phases.train_statistics(*_all_reduce((*sums, _pixels(z)), group))
        scale, shift = phases.train_norm(*_norm(layer, eps, statistics, x))
        y = phases.train_finish(z, None, scale, shift, config.activation)
        return y, SavedLayer(z, statistics, *nothing)
    kernel_size = layer.weight.shape[-1]
    sum_x, gram = phases.train_window_gram(x, kernel_size, config.stride, config.padding)
    sizes = [reference.output_size(size, kernel_size, config.stride, config.padding, 1) for size in x.shape[2:]]
    sums = _all_reduce((sum_x, gram, _pixels(x, sizes)), group)
    statistics, mean_x = phases.train_linear_statistics(_matrix(layer, x), *sums)
    w1, b1 = _folded_linear(phases, layer, eps, statistics, mean_x, x)
    y = phases.train_window(x, w1.view(layer.weight.shape), b1, *config)
    return y, SavedLayer(x.new_empty(0), statistics, mean_x, sum_x, gram)


def layer_backward(
    grad: Tensor,
    x: Tensor,
    layer: Layer,
    eps: float,
    config: LayerConfig,
    group: str,
    saved: SavedLayer,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, gamma and beta, as `backward` gives them: 5, None where `needs` is False."""
    phases = backends.train_layer_phases(x, layer)
    grad = _channels_last(grad)
    need_x, need_weight, *_ = needs
    norm = _norm(layer, eps, saved.statistics, x)
    grads: list[Tensor | None] = [None] * 5
    if is_pointwise(layer.weight, config):
        scale, shift = phases.train_norm(*norm)
        sums = phases.train_finish_backward(grad, saved.z, scale, shift, config.activation)
        *through, grads[2], grads[3], grads[4] = _through(phases, norm, sums, group)
        if need_x or need_weight:
            from_z = (grad, saved.z, scale, shift, *through, config.activation)
            grads[1], grads[0] = phases.train_pointwise_backward(*from_z, x, _matrix(layer, x), (need_weight, need_x))
    else:
        linear = _Linear(*saved[1:])
        w1, b1 = _folded_linear(phases, layer, eps, saved.statistics, saved.mean_x, x)
        kernel = w1.view(layer.weight.shape)
        t, sum_g = phases.train_window_backward(grad, x, kernel, b1, *config)
        sums = _linear_sums(phases, linear, layer, t, sum_g, group, x)
        *grads[1:], _, _ = _linear_backward(phases, linear, layer, eps, w1, t, sums, x)
        if need_x:
            through = phases.train_norm_backward(norm.statistics, norm.gamma, eps, *sums)[:3]
            grads[0] = _window_input_backward(phases, grad, x, layer, norm, through, config)
    return _for_leaves(grads, layer[:4], needs)


def _window_input_backward(
    phases: Any,
    grad: Tensor,
    x: Tensor,
    layer: Layer,
    norm: _Norm,
    through: Sequence[Tensor],
    config: LayerConfig,
) -> Tensor:
    """The gradient of a picture, which hardly anybody asks for: by phases of other layers and torch's convolution.

    In float32 at least: v is none of the tensors that the forward rounds. A 1x1 convolution with the identity for its
    weight takes the gradient from y to v.
    """
    weight = _kernel_weight(layer, x)
    wide, grad = x.to(weight.dtype), grad.to(weight.dtype)
    channels = weight.shape[0]
    v = phases.train_window(wide, weight, weight.new_zeros(channels), config.stride, config.padding, "none")
    from_v = (grad, v, *phases.train_norm(*norm), *through, config.activation)
    identity = torch.eye(channels, dtype=weight.dtype, device=weight.device)
    _, gv = phases.train_pointwise_backward(*from_v, v, identity, (False, True))
    pads = _pads(x, weight, config.stride, config.padding, 1)
    padded = _channels_last(F.pad(wide, pads))
    gx, _, _ = _convolution_backward(gv, padded, _channels_last(weight), (True, False, False), config.stride)
    return _channels_last(F.pad(gx, [-p for p in pads]).to(x.dtype))


def is_pointwise(weight: Tensor, config: LayerConfig) -> bool:
    """Whether a dense convolution's output pixels see one pixel each, and all are seen."""
    return weight.shape[-1] == 1 and config.stride == 1 and config.padding <= 0


def _linear_sums(
    phases: Any, linear: _Linear, layer: Layer, t: Tensor, sum_g: Tensor, group: str, x: Tensor
) -> tuple[Tensor, ...]:
    """sum_g, sum_gv, all_g, all_gv of a linear layer."""
    own = (sum_g, phases.train_linear_sums(_matrix(layer, x), t))
    return *own, *(_all_reduce(own, group) if linear.statistics.dim() == 2 else own)


def _linear_backward(
    phases: Any,
    linear: _Linear,
    layer: Layer,
    eps: float,
    w1: Tensor | None,
    t: Tensor,
    sums: Sequence[Tensor],
    x: Tensor,
) -> list[Tensor | None]:
    """Gradients of weight, bias, gamma, beta; and m, c0 of `train_input_backward`, None with fixed statistics."""
    statistics, gamma, _, _ = norm = _norm(layer, eps, linear.statistics, x)
    of_x = (linear.sum_x, linear.gram, linear.mean_x)
    *grads, m, c0 = phases.train_expand_backward(_matrix(layer, x), w1, statistics, gamma, eps, t, *sums, *of_x)
    return [*grads, None, None] if norm.fixed else [*grads, m, c0]


def _learned(tensors: BlockTensors) -> tuple[Tensor | None, ...]:
    """Weight, bias, gamma and beta of each layer."""
    return *tensors[:4], *tensors[6:10], *tensors[12:16]


def _for_leaves(
    grads: Sequence[Tensor | None], parameters: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Of x and of parameters, in the dtype and strides of each; None where `needs` is False."""
    grad_x, *others = grads
    return [
        grad_x if needs[0] else None,
        *(
            gradient_like(leaf, g) if needed and g is not None and leaf is not None else None
            for g, leaf, needed in zip(others, parameters, needs[1:], strict=True)
        ),
    ]


def _through(phases: Any, norm: _Norm, sums: Sequence[Tensor], group: str) -> tuple[Tensor, ...]:
    """a, b, c of the way back through a BatchNorm, and the gradients of the convolution's bias, gamma and beta.

    Every process' pixels depend on everybody's statistics; the gradients of gamma and beta are this process' own.
    """
    shared = sums if norm.fixed else _all_reduce(sums, group)
    return phases.train_norm_backward(norm.statistics, norm.gamma, norm.eps, *sums, *shared)


def _through_fixed(scale: Tensor) -> Sequence[Tensor]:
    """a, b, c through fixed statistics, where nobody asked for the gradients of its parameters."""
    zero = torch.zeros_like(scale)
    return scale, zero, zero


def _all_reduce(sums: Sequence[Tensor], group: str) -> Sequence[Tensor]:
    """`sums` over the processes of `group`."""
    if not group:
        return sums
    functional = torch.ops._c10d_functional
    flat = torch.cat([t.flatten() for t in sums])
    parts = functional.wait_tensor(functional.all_reduce(flat, "sum", group)).split([t.numel() for t in sums])
    return [part.view_as(own) for part, own in zip(parts, sums, strict=True)]


# ---- What the phases take --------------------------------------------------------------------------------------------


def _channels_last(image: Tensor) -> Tensor:
    """As the phases read it: converted once, and not in each of them."""
    return image.contiguous(memory_format=torch.channels_last)


def _norm(layer: Layer, eps: float, statistics: Tensor, x: Tensor) -> _Norm:
    """With batch statistics [3, channels], or else (statistics [0]) with the running ones, or without any."""
    dtype, channels = _compute_dtype(x), layer.weight.shape[0]
    gamma, beta = layer.gamma, layer.beta
    gamma = x.new_ones(channels, dtype=dtype) if gamma is None else _as_dtype(gamma, dtype)
    beta = x.new_zeros(channels, dtype=dtype) if beta is None else _as_dtype(beta, dtype)
    if statistics.dim() == 1:
        if layer.mean is None or layer.var is None:
            mean, var = torch.zeros_like(gamma), torch.ones_like(gamma)
        else:
            mean, var = layer.mean, layer.var
        centre = mean.double() if layer.bias is None else mean.double() - layer.bias
        statistics = torch.stack((centre, var.double()))
    return _Norm(statistics, gamma, beta, eps)


def _folded_expand(
    phases: Any, expand: Layer | None, eps: float, statistics: Tensor, mean_x: Tensor, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`_folded_linear` of the expand layer, None without one."""
    return (None, None) if expand is None else _folded_linear(phases, expand, eps, statistics, mean_x, x)


def _folded_linear(
    phases: Any, layer: Layer, eps: float, statistics: Tensor, mean_x: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """w1 [C, Cin] and b1 [C] of the phases: a linear layer with its BatchNorm."""
    return phases.train_fold_expand(_matrix(layer, x), *_norm(layer, eps, statistics, x), mean_x)


def _matrix(layer: Layer, x: Tensor) -> Tensor:
    """A 1x1 convolution's weight [out, in]."""
    return _kernel_weight(layer, x).flatten(1)


def _kernel_weight(layer: Layer, x: Tensor) -> Tensor:
    return _as_dtype(layer.weight, _compute_dtype(x)).contiguous()


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the phases of this x compute in: float32, for float64 float64."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which takes a while to find out that there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _pixels(images: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Their number, or that of as many images of another `size`: float64 [1]."""
    height, width = size or images.shape[2:]
    return images.new_full((1,), images.shape[0] * height * width, dtype=torch.float64)
