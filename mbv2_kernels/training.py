"""A block with batch statistics, forward and backward: the chain of phases, and the arithmetic between them.

A phase sweeps over images (`backends.train_phases` picks who computes it, `training_reference` says what). Between two
phases stands arithmetic on vectors [channels], in float64, where it rounds nothing and costs nothing. With
SyncBatchNorm the sums that a phase gives are added up over all processes there.

A convolution's output v, without its bias, goes through a BatchNorm as v * scale + shift; the way back is

    gv = a * g + b * v + c      a = scale,  b = -scale * invstd * S2 / P,  c = -scale * S1 / P - b * mean

with P pixels, S1 = sum(g) the gradient of beta, S2 = invstd * (sum(g * v) - mean * S1) that of gamma; b = c = 0 where
the statistics are fixed. The next phase applies it element by element. The expand layer needs no such phase: there
v = W1 x is linear in x, so mean, variance and the whole way back follow from sum(x), sum(x xᵀ) and T = sum(g xᵀ):

    mean = W1 mean(x)    variance = diag(W1 cov(x) W1ᵀ)    sum(g * v) = rowdot(W1, T)
    gx  = W1ᵀ (a * g) + W1ᵀ diag(b) W1 x + W1ᵀ c
    gW1 = a * T + b * (W1 sum(x xᵀ)) + c sum(x)ᵀ

The first term of gx and T come out of one sweep, before S1 and S2 are known: a second one is saved.

Vectors reach the phases in float32. The rounding of a scale would be the same error at every pixel, and sums over
pixels, most of all those that should vanish, would show it: so a shift is always computed from the rounded scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends import BlockConfig
from .fold import NO_EPS, BlockTensors, Eps, FoldedWeights, Layer, check_shapes


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


class _Norm(NamedTuple):
    """What follows a convolution without its bias v: gamma * (v - centre) * invstd + beta = v * scale + shift.

    All [channels], float64, `scale` with a value of the phases' dtype. `pixels` is the count behind batch statistics,
    None where the statistics are fixed.
    """

    centre: Tensor
    invstd: Tensor
    scale: Tensor
    shift: Tensor
    pixels: Tensor | None


class _NormBackward(NamedTuple):
    """gv = a * g + b * v + c, and the gradients of the convolution's bias, of gamma and of beta."""

    a: Tensor
    b: Tensor
    c: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor


def forward(x: Tensor, tensors: BlockTensors, eps: Eps, config: BlockConfig, step: Step) -> tuple[Tensor, Saved]:
    """The block's output [N, Cout, Ho, Wo] in x's dtype, channels_last, and what its backward needs.

    Running statistics of layers with `step.batch` are neither read nor changed; they may be None.
    """
    phases = backends.train_phases(x, tensors)
    expand, depthwise, project = tensors.layers()
    convolution = config[:4]
    nothing = (x.new_empty(0, dtype=torch.float64) for _ in range(6))
    statistics1, statistics2, statistics3, mean_x, sum_x, gram = nothing

    if expand is not None and step.batch[0]:
        sum_x, gram = phases.train_gram(x)
        statistics1, mean_x = _linear_statistics(expand.weight, sum_x, gram, _pixels(x), step.groups[0])
    w1, b1 = _folded_expand(expand, eps[0], statistics1, mean_x, x)
    wd, w2 = _kernel_weight(depthwise, x), _kernel_weight(project, x).flatten(1)

    # d is kept until z is there in lean memory too: one block's d for a moment costs less than computing it again.
    d, total, squares = phases.train_depthwise(x, w1, b1, wd, *convolution, True)
    if step.batch[1]:
        statistics2 = _statistics(total, squares, _pixels(d), step.groups[1])
    scale2, shift2 = _vectors(x, *_norm(depthwise, eps[1], statistics2, x)[2:4])

    z, total, squares = phases.train_project(x, d, w1, b1, wd, scale2, shift2, w2, *convolution)
    if step.batch[2]:
        statistics3 = _statistics(total, squares, _pixels(z), step.groups[2])
    scale3, shift3 = _vectors(x, *_norm(project, eps[2], statistics3, x)[2:4])

    y = phases.train_finish(z, x if config.residual else None, scale3, shift3, config.final_activation)
    d = d if step.keep else x.new_empty(0)
    return y, Saved(d, z, statistics1, statistics2, statistics3, mean_x, sum_x, gram)


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
    rounded: bool = True,
) -> list[Tensor | None]:
    """Gradients of x, and of weight, bias, gamma and beta of the three layers: 13, None where `needs` is False.

    Each has the dtype of what it is the gradient of. `rounded`: where d was not kept, the forward had it in x's dtype,
    and the same values must meet the clamps again.
    """
    phases = backends.train_phases(x, tensors)
    expand, depthwise, project = tensors.layers()
    convolution = config[:4]
    need_x, need1, need2, need3 = needs[0], needs[1:5], needs[5:9], needs[9:13]
    need_below_depthwise = need_x or any(need1)
    need_below_project = need_below_depthwise or any(need2)
    grads: list[Tensor | None] = [None] * 13

    w1, b1 = _folded_expand(expand, eps[0], saved.expand_statistics, saved.mean_x, x)
    wd, w2 = _kernel_weight(depthwise, x), _kernel_weight(project, x).flatten(1)
    norm2 = _norm(depthwise, eps[1], saved.depthwise_statistics, x)
    norm3 = _norm(project, eps[2], saved.project_statistics, x)
    scale2, shift2, scale3, shift3 = _vectors(x, *norm2[2:4], *norm3[2:4])

    through3 = _through_fixed(norm3)
    if any(need3[1:]) or (norm3.pixels is not None and (need_below_project or need3[0])):
        sum_g, sum_gz = phases.train_finish_backward(grad, saved.z, scale3, shift3, config.final_activation)
        through3 = _through(norm3, sum_g, sum_gz, step.groups[2], _compute_dtype(x))
        grads[10:13] = through3[3:]
    if need_below_project or need3[0]:
        from_z = (grad, saved.z, scale3, shift3, *_vectors(x, *through3[:3]), config.final_activation)
        d = saved.d if saved.d.dim() == 4 else None
        if d is None and rounded:
            d, *_ = phases.train_depthwise(x, w1, b1, wd, *convolution, True)
        to_d = (x, d, w1, b1, wd, scale2, shift2)

        through2 = _through_fixed(norm2)
        need_sums = any(need2[1:]) or (norm2.pixels is not None and (need_below_depthwise or need2[0]))
        if need3[0] or need_sums:
            grads[9], sum_g, sum_gd = phases.train_project_backward(
                *from_z, *to_d, w2, *convolution, (need3[0], need_sums)
            )
            if need_sums:
                through2 = _through(norm2, sum_g, sum_gd, step.groups[1], _compute_dtype(x))
                grads[6:9] = through2[3:]
        if need_below_depthwise or need2[0]:
            g, grads[5], t, sum_g = phases.train_depthwise_backward(
                *from_z, *to_d, *_vectors(x, *through2[:3]), w2, *convolution, (need_below_depthwise, need2[0])
            )
            if need_below_depthwise:
                m = c0 = None
                if expand is not None and w1 is not None:
                    norm1 = _norm(expand, eps[0], saved.expand_statistics, x)
                    grads[1:5], m, c0 = _expand_backward(expand, w1, norm1, t, sum_g, saved, step.groups[0])
                if need_x:
                    grads[0] = phases.train_input_backward(g, x, m, c0, grad if config.residual else None)
    leaves = (x, *(t for layer in (tensors[:4], tensors[6:10], tensors[12:16]) for t in layer))
    return [
        g.to(leaf.dtype).view(leaf.shape) if needed and g is not None and leaf is not None else None
        for g, leaf, needed in zip(grads, leaves, needs, strict=True)
    ]


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
        w1, b1 = _folded_expand(tensors.layers()[0], 0.0, none, none, x)
        wd, w2 = _kernel_weight(depthwise, x), _kernel_weight(project, x).flatten(1)
        scale2, shift2 = _vectors(x, *_norm(depthwise, 0.0, none, x)[2:4])
        z, *_ = phases.train_project(x, None, w1, b1, wd, scale2, shift2, w2, *config[:4])
    step = Step((False,) * 3, ("",) * 3, False)
    saved = Saved(none, z, *(none,) * 6)
    need_x, *rest = needs
    learned = [need for i in (0, 2, 4) for need in (rest[i], rest[i + 1], False, False)]
    grads = backward(grad, x, tensors, NO_EPS, config, step, saved, (need_x, *learned), rounded=False)
    return [grads[i] for i in (0, 1, 2, 5, 6, 9, 10)]


def _expand_backward(
    expand: Layer, w1: Tensor, norm: _Norm, t: Tensor, sum_g: Tensor, saved: Saved, group: str
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Gradients of weight, bias, gamma, beta; and m, c0 of `train_input_backward`, None with fixed statistics."""
    # In float64, as what rounds in a library's product may round otherwise with another number of threads.
    weight, t = expand.weight.flatten(1).double(), t.double()
    through = _through(norm, sum_g, (weight * t).sum(1), group, w1.dtype)
    gw1 = through.a[:, None] * t
    if norm.pixels is None:
        return [gw1, *through[3:]], None, None
    gw1 += torch.addr(through.b[:, None] * (weight @ saved.gram), through.c, saved.sum_x)
    m = -(weight.T @ (through.b[:, None] * weight)).to(w1.dtype)
    # W1ᵀ c is what lets gx sum up to zero over all pixels: computed as that, from the rounded m and w1 of the sweep.
    (all_g,) = _all_reduce(sum_g[None], group)
    c0 = (all_g / norm.pixels.clamp(min=1)) @ w1.double() - m.double() @ saved.mean_x
    return [gw1, *through[3:]], m, c0.to(w1.dtype)


# ---- BatchNorm, on vectors -------------------------------------------------------------------------------------------


def _norm(layer: Layer, eps: float, statistics: Tensor, x: Tensor) -> _Norm:
    """With batch statistics [3, channels], or else (statistics [0]) with the running ones, or without any."""
    if statistics.dim() == 2:
        centre, var, pixels = statistics.unbind()
    elif layer.mean is not None and layer.var is not None:
        centre, var, pixels = layer.mean.double(), layer.var.double(), None
        if layer.bias is not None:
            centre = centre - layer.bias
    else:
        one = layer.weight.new_ones(layer.weight.shape[0], dtype=torch.float64)
        shift = torch.zeros_like(one) if layer.bias is None else layer.bias.double()
        return _Norm(-shift, one, one, shift, None)
    invstd = (var + eps).rsqrt()
    scale = invstd if layer.gamma is None else invstd * layer.gamma
    scale = scale.to(_compute_dtype(x)).double()
    shift = -centre * scale if layer.beta is None else layer.beta - centre * scale
    return _Norm(centre, invstd, scale, shift, pixels)


def _through_fixed(norm: _Norm) -> _NormBackward:
    """The way back through fixed statistics, where nobody asked for the gradients of its parameters."""
    zero = torch.zeros_like(norm.scale)
    return _NormBackward(norm.scale, zero, zero, zero, zero, zero)


def _through(norm: _Norm, sum_g: Tensor, sum_gv: Tensor, group: str, dtype: torch.dtype) -> _NormBackward:
    """`dtype`: of the phases."""
    gamma = (sum_gv - norm.centre * sum_g) * norm.invstd
    zero = torch.zeros_like(sum_g)
    if norm.pixels is None:
        return _NormBackward(norm.scale, zero, zero, norm.scale * sum_g, gamma, sum_g)
    # Every process' pixels depend on everybody's statistics; the gradients of gamma and beta are this process' own.
    all_g, all_gamma = _all_reduce(torch.stack((sum_g, gamma)), group)
    per_pixel = norm.scale / norm.pixels.clamp(min=1)
    b = (-per_pixel * norm.invstd * all_gamma).to(dtype).double()
    return _NormBackward(norm.scale, b, -per_pixel * all_g - b * norm.centre, zero, gamma, sum_g)


def _statistics(total: Tensor, squares: Tensor, pixels: int, group: str) -> Tensor:
    """[3, channels] of `Saved`, from sums of v and v²."""
    total, squares, count = _all_reduce(torch.stack((total, squares, torch.full_like(total, pixels))), group)
    mean, of_squares = total / count.clamp(min=1), squares / count.clamp(min=1)
    var = torch.addcmul(of_squares, mean, mean, value=-1).clamp(min=0)
    return torch.stack((mean, var, count))


def _linear_statistics(weight: Tensor, sum_x: Tensor, gram: Tensor, pixels: int, group: str) -> tuple[Tensor, Tensor]:
    """[3, channels] of `Saved` for v = W x, and x's mean, from sums of x and x xᵀ."""
    count = sum_x.new_full((1,), pixels)
    if group:
        own = (sum_x, gram, count)
        sums = _all_reduce(torch.cat([t.flatten() for t in own]), group).split([t.numel() for t in own])
        sum_x, gram, count = (t.view_as(mine) for t, mine in zip(sums, own, strict=True))
    mean_x = sum_x / count.clamp(min=1)
    covariance = torch.addr(gram / count.clamp(min=1), mean_x, mean_x, alpha=-1)
    weight = weight.flatten(1).double()
    mean, var = weight @ mean_x, ((weight @ covariance) * weight).sum(1).clamp(min=0)
    return torch.stack((mean, var, count.expand_as(mean))), mean_x


def _all_reduce(sums: Tensor, group: str) -> Tensor:
    """`sums` over the processes of `group`."""
    if not group:
        return sums
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(sums.contiguous(), "sum", group))


# ---- What the phases take --------------------------------------------------------------------------------------------


def _folded_expand(
    expand: Layer | None, eps: float, statistics: Tensor, mean_x: Tensor, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """w1 [C, Cin] and b1 [C] of the phases: the expand layer with its BatchNorm."""
    if expand is None:
        return None, None
    norm = _norm(expand, eps, statistics, x)
    (w1,) = _vectors(x, expand.weight.flatten(1) * norm.scale[:, None])
    b1 = norm.shift
    if norm.pixels is not None:
        b1 = b1 + norm.scale * norm.centre - w1.double() @ mean_x
    return w1.contiguous(), _vectors(x, b1)[0]


def _kernel_weight(layer: Layer, x: Tensor) -> Tensor:
    return _vectors(x, layer.weight)[0].contiguous()


def _vectors(x: Tensor, *tensors: Tensor) -> list[Tensor]:
    """In the dtype that the phases of this x compute in: float32, for float64 float64."""
    dtype = _compute_dtype(x)
    return [t.to(dtype) for t in tensors]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _pixels(image: Tensor) -> int:
    return image.shape[0] * image.shape[2] * image.shape[3]
