"""A block and a dense layer with every option that training knows, and what one step of them gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from blocks import BOUNDS, GRADIENT_BOUNDS, relative_error
from torch import Tensor, nn

import mbv2_kernels as mbv2
from mbv2_kernels import reference

DRAWS = 8
NEAR_AN_EDGE = 5e-6  # several rounding steps of what meets the clamps in float32


class Block(nn.Module):
    """expand, depthwise, project, written out plainly. `norms`: which of the three layers have a BatchNorm."""

    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 8,
        hidden: int = 24,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        expand: bool = True,
        same: bool = False,
        activation: type[nn.Module] = nn.ReLU6,
        final: type[nn.Module] = nn.Identity,
        norms: tuple[bool, bool, bool] = (True, True, True),
        bias: bool = False,
        affine: bool = True,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        hidden = hidden if expand else in_channels

        def norm(there: bool, channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels, momentum=momentum, affine=affine) if there else nn.Identity()

        layers: list[nn.Module] = []
        if expand:
            layers += [nn.Conv2d(in_channels, hidden, 1, bias=bias), norm(norms[0], hidden), activation()]
        self.before = nn.Sequential(*layers)
        self.depthwise = nn.Conv2d(
            hidden,
            hidden,
            kernel_size,
            stride,
            0 if same else dilation * (kernel_size - 1) // 2,
            dilation,
            groups=hidden,
            bias=bias,
        )
        self.after = nn.Sequential(
            norm(norms[1], hidden),
            activation(),
            nn.Conv2d(hidden, out_channels, 1, bias=bias),
            norm(norms[2], out_channels),
            final(),
        )
        self.same = same
        self.residual = stride == 1 and in_channels == out_channels and final is nn.Identity
        _randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        y = self.after(self.depthwise(_padded(y, self.depthwise) if self.same else y))
        return x + y if self.residual else y

    def norms_of_kept(self) -> list[nn.Module]:
        """What normalises the tensors that are kept for backward, or are computed again with the same rounding."""
        return [self.after[0], self.after[3]]


class DenseLayer(nn.Module):
    """A stem, or with kernel_size 1 a head, written out plainly."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 8,
        kernel_size: int = 3,
        *,
        stride: int = 2,
        same: bool = False,
        activation: type[nn.Module] = nn.ReLU6,
        bias: bool = False,
        affine: bool = True,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        padding = 0 if same else kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.norm = nn.BatchNorm2d(out_channels, momentum=momentum, affine=affine)
        self.activation = activation()
        self.same = same
        _randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(_padded(x, self.conv) if self.same else x)))

    def norms_of_kept(self) -> list[nn.Module]:
        return [self.norm] if self.conv.kernel_size == (1, 1) else []


Trainable = Block | DenseLayer


def _randomise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)


def _padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    geometry = (conv.kernel_size[0], conv.stride[0], reference.SAME, conv.dilation[0])
    pads = [p for size in (x.shape[3], x.shape[2]) for p in reference.padding_amounts(size, *geometry)]
    return nn.functional.pad(x, pads)


def step(model: nn.Module, x: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output, gradients and buffers of one forward and backward; `grad` is the gradient of the output."""
    x = x.clone().requires_grad_()
    y = model(x)
    if grad is None:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def fused(model: nn.Module, **options: Any) -> nn.Module:
    return mbv2.fuse(copy.deepcopy(model), strict=True, **options)


def exact_step(model: Trainable, x: Tensor) -> tuple[dict[str, Tensor], float]:
    """One step in float64 with what x's dtype rounds in d and z, and how near a value came to the edge of a clamp.

    A dense layer that looks at more than one pixel keeps nothing, and rounds nothing but its output.

    The two tensors that are kept are rounded after their statistics have been taken, as the kernels do it. This matters
    where a value rounds across the edge of a clamp, which changes gradients by all of itself: with other rules in the
    reference such flips hide everything else. In bfloat16, over 20 draws of "residual", the largest error of a gradient
    is 0.28 times the bound with these rules, 1.6 with statistics of rounded values, 7.8 without any rounding (and 48 in
    unfused training).
    """
    model = copy.deepcopy(model).double()
    distances: list[Tensor] = []

    def measure(activation: nn.Module, inputs: tuple[Tensor]) -> None:
        for edge in (0, 6)[: 1 + isinstance(activation, nn.ReLU6)]:
            away = (inputs[0].detach() - edge).abs()
            distances.append(away[away > 0].min())  # 0: a sum of zeros, which is exact everywhere

    def keep_rounded(norm: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        (v,) = inputs
        rounding = (v.to(x.dtype).double() - v).detach()
        if isinstance(norm, nn.BatchNorm2d):
            var = v.var((0, 2, 3), correction=0) if norm.training else norm.running_var
            scale = (var + norm.eps).rsqrt() * (norm.weight if norm.affine else 1)
            rounding = rounding * scale[:, None, None]
        return y + rounding

    for module in model.modules():
        if isinstance(module, nn.ReLU6 | nn.ReLU):
            module.register_forward_pre_hook(measure)
    for norm in model.norms_of_kept():
        norm.register_forward_hook(keep_rounded)
    return step(model, x.double()), min((float(d) for d in distances), default=math.inf)


def check_step(model: Trainable, *shape: int, dtype: torch.dtype = torch.float32) -> None:
    """Steps on DRAWS random inputs of this shape, against float64 and unfused.

    Each result and each gradient is within its bound, and lean memory gives the same, bit by bit. And the worst result
    and the worst gradient of the block are not more than twice as far from float64 as the unfused block's, as a
    geometric mean over the draws, with one rounding step as the least error that counts. A single draw says little: its
    errors are those of few numbers, and in float32 the ratio, which has a mean of 1.0 to 1.1, scatters by a factor of
    almost 2 both ways. Draws with a value so near the edge of a clamp that float32's rounding may decide its side are
    drawn again: the gradient is one of two then, and which one is no question of accuracy.
    """
    bounds = BOUNDS[dtype], GRADIENT_BOUNDS[dtype]
    ratios: list[list[float]] = []
    for draw in range(DRAWS):
        nearest = 0.0
        while nearest < NEAR_AN_EDGE:
            x = (torch.randn(shape) + 0.5).to(dtype)
            exact, nearest = exact_step(model, x)
        ours = fused(model)
        got, plain = step(ours, x), step(copy.deepcopy(model), x)
        assert {row.backend for row in mbv2.summary(ours)} == {"cpu"}, mbv2.summary(ours)
        if draw == 0:
            lean = step(fused(model, memory="lean"), x)
            assert all(torch.equal(got[name], lean[name]) for name in got)
        worst = worst_errors(model, exact, got, plain, bounds)
        ratios.append([ours / unfused for ours, unfused in worst])
    means = torch.tensor(ratios).log().mean(0).exp().tolist()
    assert max(means) <= 2, f"worst result and worst gradient, in units of the unfused block's errors: {means}"


def worst_errors(
    model: Trainable,
    exact: dict[str, Tensor],
    got: dict[str, Tensor],
    plain: dict[str, Tensor],
    bounds: Sequence[float],
) -> list[tuple[float, float]]:
    """Of results, and of gradients: the largest error, fused and unfused. Asserts that the fused ones are in `bounds`
    and that dtypes, shapes and counters are the unfused block's."""
    assert got.keys() == plain.keys()
    gradients = dict(model.named_parameters()).keys() | {"x"}
    eps = torch.finfo(plain["y"].dtype).eps
    errors: tuple[list[list[float]], ...] = ([[eps, eps]], [[eps, eps]])
    for name, expected in exact.items():
        assert got[name].dtype == plain[name].dtype and got[name].shape == plain[name].shape, name
        if not expected.is_floating_point():
            assert torch.equal(got[name], plain[name]), name
        elif float(expected.norm()) < 1e-10 * float(exact["y"].norm()):
            # Nothing but rounding noise, ours or theirs: a bias before a BatchNorm has no effect.
            assert float(got[name].double().norm()) <= max(float(plain[name].double().norm()), eps), name
        else:
            pair = [relative_error(found[name], expected) for found in (got, plain)]
            kind = name in gradients
            assert pair[0] < bounds[kind], f"{name}: {pair[0]:.1e}"
            errors[kind].append(pair)
    return [(max(ours), max(unfused)) for ours, unfused in (zip(*pairs, strict=True) for pairs in errors)]
