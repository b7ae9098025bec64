"""The phases of a training step in plain PyTorch operations: the oracle of the ops `mbv2::train_...`.

With batch statistics a block cannot run in one sweep: a BatchNorm's mean and variance must be complete, and summed over
all processes, before the layer after it can start. So a step is a chain of phases, each one op, with arithmetic on a
few vectors [channels] in between (`training.py`):

    forward    train_gram -> train_depthwise -> train_project -> train_finish
    backward   train_finish_backward -> train_project_backward -> train_depthwise_backward -> train_input_backward

Every function here takes and returns what the op of its name does, at any floating point dtype and on any device; the
kernels compute in float32, this computes in float32 or, for float64 tensors, in float64.

    x  [N, Cin, H, W]      the block's input, any strides
    d  [N, C, Ho, Wo]      what the depthwise convolution gives, before its bias and BatchNorm
    z  [N, Cout, Ho, Wo]   what the projection gives, before its bias and BatchNorm
    w1 [C, Cin], b1 [C]    the expand convolution with its BatchNorm folded in; None, None: no expand layer, C = Cin
    wd [C, 1, k, k], w2 [Cout, C]

    e = activation(w1 x + b1)                 x itself without an expand layer; 0 around the image
    d = depthwise(e, wd)
    h = activation(d * scale2 + shift2)       scale and shift: the BatchNorm and the bias between the two, [channels]
    z = w2 h
    y = final_activation(z * scale3 + shift3) (+ x)

Activations have x's dtype, so have d, z and gx. Weights, vectors and gradients of weights are float32, sums over pixels
float64. `d` None means: compute it again from x. All results are dense, images channels_last. What `needs` does not ask
for comes as an empty tensor [0].

The dense layers around the blocks have phases of their own, whose mathematics stands in `training.py`. A 1x1
convolution, the head, gives z of x, and then there is `train_finish` and its backward. A convolution of few channels
that looks at k x k pixels, the stem, is linear in these windows of x [Cin k k], in the order of its weight's elements:

    y = activation(e),  e = w1 * x + b1    w1 [C, Cin, k, k], b1 [C]: with its BatchNorm folded in

Between two phases stands BatchNorm, as arithmetic on vectors, in float64 (below the phases here). A convolution's
output, without its bias, is called v there:

    statistics   float64 [3, channels]: mean and biased variance of v, and the number of pixels behind them;
                 or [2, channels]: fixed ones, which do not depend on the batch
    gamma, beta  [channels], in the dtype of the results
    sum_g, sum_gv, all_g, all_gv   float64 [channels]: sums over pixels of the gradient g after the BatchNorm, and of
                 g * v; of this process, and of all that share the statistics
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import _activate, _activation_backward, _convolution_backward, _pads, conv_act, padding_amounts


class _Config(NamedTuple):
    stride: int
    padding: int
    dilation: int
    activation: str


def train_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all pixels of x and of x xᵀ: float64 [Cin] and [Cin, Cin].

    They give mean and variance of every linear function of x, so the expand layer's batch statistics need no expanded
    tensor.
    """
    pixels = _rows(x.double())
    return pixels.sum(0), pixels.T @ pixels


def train_depthwise(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    wd: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d, or an empty tensor without `keep`; sums over pixels of d and d² before d is rounded: float64 [C]."""
    d = _depthwise(x, w1, b1, wd, _Config(stride, padding, dilation, activation))
    return _image(d, x.dtype) if keep else x.new_empty(0), *_sums(d)


def train_project(
    x: Tensor,
    d: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    wd: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    w2: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """z; sums over pixels of z and z² before z is rounded: float64 [Cout]."""
    d = _depthwise(x, w1, b1, wd, _Config(stride, padding, dilation, activation)) if d is None else _wide(d)
    z = F.conv2d(_activate(_affine(d, scale2, shift2), activation), w2[:, :, None, None])
    return _image(z, x.dtype), *_sums(z)


def train_finish(z: Tensor, x: Tensor | None, scale3: Tensor, shift3: Tensor, final_activation: str) -> Tensor:
    """The block's output; x is added if it is given."""
    y = _activate(_affine(_wide(z), scale3, shift3), final_activation)
    return _image(y if x is None else y + x, z.dtype)


def train_finish_backward(
    gy: Tensor, z: Tensor, scale3: Tensor, shift3: Tensor, final_activation: str
) -> tuple[Tensor, Tensor]:
    """With g the gradient before the final activation: sums over pixels of g and g * z, float64 [Cout]."""
    g = _final_backward(gy, z, scale3, shift3, final_activation)
    return _rows(g.double()).sum(0), _rows(g.double() * z).sum(0)


def train_project_backward(
    gy: Tensor,
    z: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    a3: Tensor,
    b3: Tensor,
    c3: Tensor,
    final_activation: str,
    x: Tensor,
    d: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    wd: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    w2: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    activation: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of w2 [Cout, C] if needs[0]; sums over pixels of g2 and g2 * d, float64 [C], if needs[1].

    gz = a3 * g + b3 * z + c3 is the gradient of z (through its BatchNorm), g2 = w2ᵀ gz where h is not clamped.
    """
    need_w2, need_sums = needs
    d = _depthwise(x, w1, b1, wd, _Config(stride, padding, dilation, activation)) if d is None else _wide(d)
    before = _affine(d, scale2, shift2)
    gz = _z_backward(gy, z, scale3, shift3, a3, b3, c3, final_activation)
    gh, gw2, _ = _convolution_backward(
        gz, _activate(before, activation), w2[:, :, None, None], (need_sums, need_w2, False)
    )
    none = x.new_empty(0)
    gw2 = gw2.flatten(1).contiguous() if need_w2 else none
    if not need_sums:
        return gw2, none, none
    g2 = _activation_backward(gh, before, activation)
    return gw2, _rows(g2.double()).sum(0), _rows(g2.double() * d).sum(0)


def train_depthwise_backward(
    gy: Tensor,
    z: Tensor,
    scale3: Tensor,
    shift3: Tensor,
    a3: Tensor,
    b3: Tensor,
    c3: Tensor,
    final_activation: str,
    x: Tensor,
    d: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    wd: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    a2: Tensor,
    b2: Tensor,
    c2: Tensor,
    w2: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    activation: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G like x but float32, the gradient of wd, T [C, Cin] and the sum over pixels of g1, float64 [C].

    gd = a2 * g2 + b2 * d + c2 is the gradient of d (through its BatchNorm), ge that of e, g1 = ge where e is not
    clamped. G = w1ᵀ g1 and T = g1 xᵀ, summed over pixels: what the gradients of x and of w1 are made of. Without an
    expand layer G = ge, and T and the sum are empty. needs[0]: G, T and the sum; needs[1]: the gradient of wd.
    """
    need_x, need_wd = needs
    config = _Config(stride, padding, dilation, activation)
    expanded, e = _expand(x, w1, b1, activation)
    pads = _pads(e, wd, *config[:3])
    padded = F.pad(e, pads)
    d = _filter(padded, wd, config) if d is None else _wide(d)
    gz = _z_backward(gy, z, scale3, shift3, a3, b3, c3, final_activation)
    gh = F.conv_transpose2d(gz, w2[:, :, None, None])
    g2 = _activation_backward(gh, _affine(d, scale2, shift2), activation)
    gd = _affine(g2, a2, c2) + d * _vector(b2, d)
    g_padded, gwd, _ = _convolution_backward(gd, padded, wd, (need_x, need_wd, False), stride, dilation, wd.shape[0])
    none = x.new_empty(0)
    gwd = gwd.contiguous() if need_wd else none
    if not need_x:
        return none, gwd, none, none
    left, right, top, bottom = pads
    g1 = F.pad(g_padded, (-left, -right, -top, -bottom))
    if w1 is None:
        return _image(g1, g1.dtype), gwd, none, none
    g1 = _activation_backward(g1, expanded, activation)
    t = _rows(g1).T @ _rows(_wide(x))
    return _image(F.conv_transpose2d(g1, w1[:, :, None, None]), g1.dtype), gwd, t, _rows(g1.double()).sum(0)


def train_input_backward(g: Tensor, x: Tensor, m: Tensor | None, c0: Tensor | None, gy: Tensor | None) -> Tensor:
    """The gradient of x in x's dtype: G - m x - c0 (+ gy); m [Cin, Cin] and c0 [Cin] are given or None together."""
    gx = g
    if m is not None and c0 is not None:
        gx = gx - F.conv2d(_wide(x), m[:, :, None, None], c0)
    return _image(gx if gy is None else gx + gy, x.dtype)


# ---- Dense layers around the blocks ----------------------------------------------------------------------------------


def train_pointwise(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z = w x, w [Cout, Cin]; sums over pixels of z and z² before z is rounded: float64 [Cout]."""
    z = F.conv2d(_wide(x), w[:, :, None, None])
    return _image(z, x.dtype), *_sums(z)


def train_pointwise_backward(
    gy: Tensor,
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    activation: str,
    x: Tensor,
    w: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of w [Cout, Cin] if needs[0], and of x in x's dtype if needs[1]."""
    need_w, need_x = needs
    gz = _z_backward(gy, z, scale, shift, a, b, c, activation)
    gx, gw, _ = _convolution_backward(gz, _wide(x), w[:, :, None, None], (need_x, need_w, False))
    none = x.new_empty(0)
    return gw.flatten(1).contiguous() if need_w else none.to(w.dtype), _image(gx, x.dtype) if need_x else none


def train_window_gram(x: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """Sums over all output pixels of the window p and of p pᵀ: float64 [Cin k k] and [Cin k k, Cin k k]."""
    windows = _windows(x.double(), kernel_size, stride, padding)
    return windows.sum(0), windows.T @ windows


def train_window(x: Tensor, w1: Tensor, b1: Tensor, stride: int, padding: int, activation: str) -> Tensor:
    """y."""
    return _image(conv_act(x, w1, b1, stride=stride, padding=padding, activation=activation), x.dtype)


def train_window_backward(
    gy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, stride: int, padding: int, activation: str
) -> tuple[Tensor, Tensor]:
    """With g the gradient of e: T, the sum over pixels of g pᵀ [C, Cin k k], and the sum of g, float64 [C]."""
    g = _window_backward(gy, x, w1, b1, stride, padding, activation)
    return _rows(g).T @ _windows(_wide(x), w1.shape[-1], stride, padding), _rows(g.double()).sum(0)


# ---- BatchNorm, between the phases -----------------------------------------------------------------------------------


def train_statistics(total: Tensor, squares: Tensor, pixels: Tensor) -> Tensor:
    """Statistics [3, channels] of v, from sums of v and v² over `pixels` [1] pixels."""
    count = pixels.clamp(min=1)
    mean = total / count
    var = torch.addcmul(squares / count, mean, mean, value=-1).clamp(min=0)
    return torch.stack((mean, var, pixels.expand_as(mean)))


def train_linear_statistics(weight: Tensor, sum_x: Tensor, gram: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [3, C] of v = weight x, and the mean of x [Cin], from sums of x and x xᵀ over `pixels` [1] pixels."""
    count = pixels.clamp(min=1)
    mean_x = sum_x / count
    covariance = torch.addr(gram / count, mean_x, mean_x, alpha=-1)
    weight = weight.double()
    mean, var = weight @ mean_x, ((weight @ covariance) * weight).sum(1).clamp(min=0)
    return torch.stack((mean, var, pixels.expand_as(mean))), mean_x


def train_norm(statistics: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """scale and shift, with which the BatchNorm makes v * scale + shift of v."""
    norm = _norm(statistics, gamma, eps)
    return norm.scale.to(gamma.dtype), (beta - norm.centre * norm.scale).to(gamma.dtype)


def train_fold_expand(
    weight: Tensor, statistics: Tensor, gamma: Tensor, beta: Tensor, eps: float, mean_x: Tensor
) -> tuple[Tensor, Tensor]:
    """w1 and b1: the BatchNorm in the convolution before it. b1 makes up for what w1's rounding does to the mean."""
    norm = _norm(statistics, gamma, eps)
    w1 = (weight.double() * norm.scale[:, None]).to(gamma.dtype)
    b1 = beta - norm.centre * norm.scale
    if norm.pixels is not None:
        b1 = b1 + norm.scale * norm.centre - w1.double() @ mean_x
    return w1, b1.to(gamma.dtype)


def train_norm_backward(
    statistics: Tensor, gamma: Tensor, eps: float, sum_g: Tensor, sum_gv: Tensor, all_g: Tensor, all_gv: Tensor
) -> tuple[Tensor, ...]:
    """a, b, c of gv = a * g + b * v + c; and the gradients of the convolution's bias, of gamma and of beta."""
    back = _norm_backward(statistics, gamma, eps, sum_g, sum_gv, all_g, all_gv)
    return tuple(t.to(gamma.dtype) for t in back)


def train_linear_sums(weight: Tensor, t: Tensor) -> Tensor:
    """sum_gv of v = weight x [C], from t, the sum over pixels of g xᵀ."""
    return (weight.double() * t.double()).sum(1)


def train_expand_backward(
    weight: Tensor,
    w1: Tensor,
    statistics: Tensor,
    gamma: Tensor,
    eps: float,
    t: Tensor,
    sum_g: Tensor,
    sum_gv: Tensor,
    all_g: Tensor,
    all_gv: Tensor,
    sum_x: Tensor,
    gram: Tensor,
    mean_x: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of weight, bias, gamma and beta of the expand layer; and m and c0 of `train_input_backward`.

    v = weight x is linear in x, so sums over this process' pixels of x, x xᵀ and g xᵀ (t) are all that is needed. With
    fixed statistics nothing but g is, and m and c0 are empty.
    """
    dtype, weight = gamma.dtype, weight.double()
    back = _norm_backward(statistics, gamma, eps, sum_g, sum_gv, all_g, all_gv)
    gradients = [gradient.to(dtype) for gradient in (back.bias, back.gamma, back.beta)]
    gw = back.a[:, None] * t
    if statistics.shape[0] == 2:
        return gw.to(dtype), *gradients, w1.new_empty(0), w1.new_empty(0)
    gw += torch.addr(back.b[:, None] * (weight @ gram), back.c, sum_x)
    m = -(weight.T @ (back.b[:, None] * weight)).to(dtype)
    # weightᵀ c is what lets gx sum up to zero over all pixels: computed as that, from the m and w1 that the sweep has.
    c0 = (all_g / statistics[2].clamp(min=1)) @ w1.double() - m.double() @ mean_x
    return gw.to(dtype), *gradients, m, c0.to(dtype)


class _Norm(NamedTuple):
    """gamma * (v - centre) * invstd + beta. `scale` has a value of the phases' dtype; pixels None: fixed."""

    centre: Tensor
    invstd: Tensor
    scale: Tensor
    pixels: Tensor | None


class _NormBackward(NamedTuple):
    a: Tensor
    b: Tensor
    c: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor


def _norm(statistics: Tensor, gamma: Tensor, eps: float) -> _Norm:
    centre, var, *pixels = statistics.unbind()
    invstd = (var + eps).rsqrt()
    return _Norm(centre, invstd, (invstd * gamma).to(gamma.dtype).double(), pixels[0] if pixels else None)


def _norm_backward(
    statistics: Tensor, gamma: Tensor, eps: float, sum_g: Tensor, sum_gv: Tensor, all_g: Tensor, all_gv: Tensor
) -> _NormBackward:
    norm = _norm(statistics, gamma, eps)
    zero = torch.zeros_like(sum_g)
    own_gamma, all_gamma = ((gv - norm.centre * g) * norm.invstd for g, gv in ((sum_g, sum_gv), (all_g, all_gv)))
    if norm.pixels is None:
        return _NormBackward(norm.scale, zero, zero, norm.scale * sum_g, own_gamma, sum_g)
    per_pixel = norm.scale / norm.pixels.clamp(min=1)
    b = (-per_pixel * norm.invstd * all_gamma).to(gamma.dtype).double()
    return _NormBackward(norm.scale, b, -per_pixel * all_g - b * norm.centre, zero, own_gamma, sum_g)


# ---- What the phases are made of -------------------------------------------------------------------------------------


def _expand(x: Tensor, w1: Tensor | None, b1: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """What the expand layer's activation sees, and what it gives."""
    if w1 is None:
        return _wide(x), _wide(x)
    expanded = F.conv2d(_wide(x), w1[:, :, None, None], b1)
    return expanded, _activate(expanded, activation)


def _depthwise(x: Tensor, w1: Tensor | None, b1: Tensor | None, wd: Tensor, config: _Config) -> Tensor:
    _, e = _expand(x, w1, b1, config.activation)
    return _filter(F.pad(e, _pads(e, wd, *config[:3])), wd, config)


def _filter(padded: Tensor, wd: Tensor, config: _Config) -> Tensor:
    return F.conv2d(padded, wd, None, config.stride, 0, config.dilation, groups=wd.shape[0])


def _final_backward(gy: Tensor, z: Tensor, scale3: Tensor, shift3: Tensor, final_activation: str) -> Tensor:
    return _activation_backward(_wide(gy), _affine(_wide(z), scale3, shift3), final_activation)


def _z_backward(
    gy: Tensor, z: Tensor, scale3: Tensor, shift3: Tensor, a3: Tensor, b3: Tensor, c3: Tensor, final_activation: str
) -> Tensor:
    g = _final_backward(gy, z, scale3, shift3, final_activation)
    return _affine(g, a3, c3) + _wide(z) * _vector(b3, g)


def _window_backward(
    gy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, stride: int, padding: int, activation: str
) -> Tensor:
    before = conv_act(_wide(x), w1, b1, stride=stride, padding=padding)
    return _activation_backward(_wide(gy), before, activation)


def _windows(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """[N Ho Wo, Cin k k]: what the kernel sees from each output pixel."""
    rows, columns = (padding_amounts(size, kernel_size, stride, padding, 1) for size in x.shape[2:])
    windows = F.pad(x, (*columns, *rows)).unfold(2, kernel_size, stride).unfold(3, kernel_size, stride)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)


def _wide(x: Tensor) -> Tensor:
    """In the dtype that is computed in: the kernels' float32, or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _vector(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype)[:, None, None]


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * _vector(scale, x) + _vector(shift, x)


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N H W, C]: a row for each pixel."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    pixels = _rows(x.double())
    return pixels.sum(0), pixels.square().sum(0)


def _image(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last).copy_(x)
