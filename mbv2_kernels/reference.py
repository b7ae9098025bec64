"""The inverted residual block in plain PyTorch operations: the oracle that tests and benchmarks compare with.

Every backend computes what `inverted_residual` computes here, every backward what `inverted_residual_backward` does.
Both work in any floating point dtype; run them in float64 to judge a kernel.

Source: Sandler et al., MobileNetV2 (arXiv 1801.04381v4), section 3.3 and table 1; with BatchNorm folded into the
convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: `padding` as the ops take it: "same" in TensorFlow's sense, whatever the size of the image.
SAME = -1

ACTIVATIONS = ("none", "relu", "relu6")


def output_size(size: int, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    """Rows (or columns) of the output for `size` rows of input. Plain integer arithmetic: works on symbolic sizes."""
    if padding == SAME:
        return (size + stride - 1) // stride
    return (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


def padding_amounts(size: int, kernel_size: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after `size` rows. "same" puts the odd one after: (0, 1) for k = 3, stride 2, even size."""
    if padding != SAME:
        return padding, padding
    reach = (output_size(size, kernel_size, stride, padding, dilation) - 1) * stride + dilation * (kernel_size - 1) + 1
    total: Any = torch.sym_max(reach - size, 0)
    return total // 2, total - total // 2


def resolve_padding(padding: int | str | None, kernel_size: int, dilation: int) -> int:
    """The public `padding` (None: centred, an int, or "same") as the ops' integer."""
    if padding is None:
        return dilation * (kernel_size - 1) // 2
    if padding == "same":
        return SAME
    if isinstance(padding, bool) or not isinstance(padding, (int, torch.SymInt)):
        raise TypeError(f'padding must be None, an int or "same", got {padding!r}')
    if padding < SAME:
        raise ValueError(f'padding must not be negative (or be -1 for "same"), got {padding}')
    return padding


def inverted_residual(
    x: Tensor,
    w_expand: Tensor | None,
    b_expand: Tensor | None,
    w_depthwise: Tensor,
    b_depthwise: Tensor | None,
    w_project: Tensor,
    b_project: Tensor | None,
    *,
    stride: int = 1,
    padding: int | str | None = None,
    dilation: int = 1,
    activation: str | None = "relu6",
    final_activation: str | None = None,
    residual: bool = False,
) -> Tensor:
    """The block, one operation after the other; arguments and result as in `mbv2_kernels.inverted_residual`.

    Computes in the widest dtype among `x` and the weights, returns `x.dtype`. Differentiable, any number of times.
    """
    dtype = _compute_dtype(x, w_depthwise)
    hidden = x.to(dtype)
    if w_expand is not None:
        hidden = _activate(F.conv2d(hidden, w_expand.to(dtype), _to(b_expand, dtype)), activation)
    padding = resolve_padding(padding, w_depthwise.shape[-1], dilation)
    padded = F.pad(hidden, _pads(hidden, w_depthwise, stride, padding, dilation))
    hidden = F.conv2d(
        padded, w_depthwise.to(dtype), _to(b_depthwise, dtype), stride, 0, dilation, groups=w_depthwise.shape[0]
    )
    y = F.conv2d(_activate(hidden, activation), w_project.to(dtype), _to(b_project, dtype))
    y = _activate(y, final_activation)
    return (y + x if residual else y).to(x.dtype)


def inverted_residual_backward(
    grad: Tensor,
    x: Tensor,
    w_expand: Tensor | None,
    b_expand: Tensor | None,
    w_depthwise: Tensor,
    b_depthwise: Tensor | None,
    w_project: Tensor,
    b_project: Tensor | None,
    *,
    stride: int = 1,
    padding: int | str | None = None,
    dilation: int = 1,
    activation: str | None = "relu6",
    final_activation: str | None = None,
    residual: bool = False,
    needs: tuple[bool, ...] = (True,) * 7,
) -> tuple[Tensor | None, ...]:
    """Gradients of `inverted_residual` for `x` and the six weights; None where `needs` is False or the argument None.

    Nothing of the forward pass is stored: it is computed again from `x`. In float32 at least; each gradient has its
    argument's dtype. At the edges of a clamp the gradient is zero, as torch's relu6 and relu have it.
    """
    dtype = torch.promote_types(_compute_dtype(x, w_depthwise), torch.float32)
    x_, wd, w2 = x.to(dtype), w_depthwise.to(dtype), w_project.to(dtype)
    w1, b1, bd, b2 = (_to(t, dtype) for t in (w_expand, b_expand, b_depthwise, b_project))
    g = grad.to(dtype)
    padding = resolve_padding(padding, w_depthwise.shape[-1], dilation)
    need_x, need_w1, need_b1, need_wd, need_bd, need_w2, need_b2 = needs
    grads: list[Tensor | None] = [None] * 7

    # Forward again, keeping what each activation saw.
    expanded = x_ if w1 is None else F.conv2d(x_, w1, b1)
    hidden = expanded if w1 is None else _activate(expanded, activation)
    top_bottom_left_right = _pads(hidden, wd, stride, padding, dilation)
    padded = F.pad(hidden, top_bottom_left_right)
    filtered = F.conv2d(padded, wd, bd, stride, 0, dilation, groups=wd.shape[0])
    narrowed = _activate(filtered, activation)

    if final_activation not in (None, "none"):
        g = _activation_backward(g, F.conv2d(narrowed, w2, b2), final_activation)
    need_below = any(needs[:5])
    g_hidden, grads[5], grads[6] = _convolution_backward(
        g, narrowed, w2, (need_below, need_w2, need_b2 and b2 is not None)
    )
    if need_below:
        g_hidden = _activation_backward(g_hidden, filtered, activation)
        need_below = any(needs[:3])
        g_padded, grads[3], grads[4] = _convolution_backward(
            g_hidden, padded, wd, (need_below, need_wd, need_bd and bd is not None), stride, dilation, wd.shape[0]
        )
        if need_below:
            left, right, top, bottom = top_bottom_left_right
            g_x = F.pad(g_padded, (-left, -right, -top, -bottom))
            if w1 is not None:
                g_x, grads[1], grads[2] = _convolution_backward(
                    _activation_backward(g_x, expanded, activation),
                    x_,
                    w1,
                    (need_x, need_w1, need_b1 and b1 is not None),
                )
    if need_x:
        grads[0] = g_x + g if residual else g_x
    arguments = (x, w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project)
    return tuple(None if g is None or a is None else g.to(a.dtype) for g, a in zip(grads, arguments, strict=True))


def conv_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0, activation: str = "none"
) -> Tensor:
    """A dense convolution and its activation (stem, head), as the op `mbv2::conv_act` has them.

    Computes in the widest dtype among `x` and the weight, returns `x.dtype`. Differentiable, any number of times.
    """
    dtype = _compute_dtype(x, weight)
    padded = F.pad(x.to(dtype), _pads(x, weight, stride, padding, 1))
    return _activate(F.conv2d(padded, weight.to(dtype), _to(bias, dtype), stride), activation).to(x.dtype)


def conv_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int = 1,
    padding: int = 0,
    activation: str = "none",
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, ...]:
    """Gradients of `conv_act` for `x`, `weight` and `bias`; None where `needs` is False or there is no bias.

    As `inverted_residual_backward`: nothing of the forward pass is stored, and computed in float32 at least.
    """
    dtype = torch.promote_types(_compute_dtype(x, weight), torch.float32)
    left, right, top, bottom = _pads(x, weight, stride, padding, 1)
    padded, w, b = F.pad(x.to(dtype), (left, right, top, bottom)), weight.to(dtype), _to(bias, dtype)
    g = grad.to(dtype)
    if activation != "none":
        g = _activation_backward(g, F.conv2d(padded, w, b, stride), activation)
    need_x, need_weight, need_bias = needs
    g_x, g_weight, g_bias = _convolution_backward(
        g, padded, w, (need_x, need_weight, need_bias and b is not None), stride
    )
    if need_x:
        g_x = F.pad(g_x, (-left, -right, -top, -bottom))
    return tuple(
        None if g is None or t is None else g.to(t.dtype)
        for g, t in zip((g_x, g_weight, g_bias), (x, weight, bias), strict=True)
    )


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _pads(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> tuple[int, int, int, int]:
    """Left, right, top, bottom: F.pad's order. A block's zeros go around the ACTIVATED tensor."""
    kernel_size = weight.shape[-1]
    return (
        *padding_amounts(x.shape[3], kernel_size, stride, padding, dilation),
        *padding_amounts(x.shape[2], kernel_size, stride, padding, dilation),
    )


def _activate(x: Tensor, activation: str | None) -> Tensor:
    if activation == "relu6":
        return F.relu6(x)
    if activation == "relu":
        return F.relu(x)
    if activation in (None, "none"):
        return x
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _activation_backward(grad: Tensor, before: Tensor, activation: str | None) -> Tensor:
    """Through the activation whose input was `before`: nothing at its edges, as torch has it, and all at a NaN.

    So has torch in every relu_backward, and for ReLU6 in its CUDA kernel and in torch.compile. Its own CPU kernel for
    ReLU6, hardtanh_backward, has two answers for a NaN: 0 in the vectorised loop, the gradient in what remains of it.
    """
    if activation == "relu6":
        return grad.masked_fill((before <= 0) | (before >= 6), 0)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, before, 0)
    return grad


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: tuple[bool, bool, bool],
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> tuple[Any, Any, Any]:
    """Gradients of an unpadded convolution for its input, weight and bias; None for those that are not needed."""
    if not any(needs):
        return None, None, None
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], [stride] * 2, [0, 0], [dilation] * 2, False, [0, 0], groups, list(needs)
    )
