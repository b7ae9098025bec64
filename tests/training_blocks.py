"""A block with every option that training knows, and what one step of it gives, for the tests of training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from blocks import relative_error
from torch import Tensor, nn

import mbv2_kernels as mbv2
from mbv2_kernels import reference


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
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 2)
                    nn.init.normal_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        if self.same:
            geometry = (self.depthwise.kernel_size[0], self.depthwise.stride[0], -1, self.depthwise.dilation[0])
            pads = [p for size in (y.shape[3], y.shape[2]) for p in reference.padding_amounts(size, *geometry)]
            y = nn.functional.pad(y, pads)
        y = self.after(self.depthwise(y))
        return x + y if self.residual else y


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


def exact_step(model: Block, x: Tensor) -> dict[str, Tensor]:
    """One step in float64, but with the two tensors that are kept between sweeps rounded to x's dtype, as every path
    that stores them has them: a value that rounds across the edge of a clamp changes a gradient by all of itself, and
    such flips would hide everything else (in bfloat16 some gradients are off by 5e-2 from them alone)."""
    model = copy.deepcopy(model).double()
    dtype = x.dtype

    def rounded(_: nn.Module, __: object, y: Tensor) -> Tensor:
        return y + (y.detach().to(dtype).double() - y.detach())

    for convolution in (model.depthwise, model.after[2]):
        convolution.register_forward_hook(rounded)
    return step(model, x.double())


def check_step(model: Block, x: Tensor, forward_bound: float, gradient_bound: float, **options: Any) -> None:
    """One step, fused, within the bounds of float64, and no further from it than twice the unfused step is.

    The second holds for the block, the worst of its results and the worst of its gradients, and for two draws of x out
    of three: in float32 the unfused errors of so few numbers are sometimes next to nothing by luck.
    """
    verdicts: list[bool] = []
    while max(verdicts.count(True), verdicts.count(False)) < 2:
        verdicts.append(_is_as_near_as_unfused(model, x, forward_bound, gradient_bound, options))
        x = x.mean() + x.std() * torch.randn_like(x)
    assert verdicts.count(True) == 2


def _is_as_near_as_unfused(
    model: Block, x: Tensor, forward_bound: float, gradient_bound: float, options: dict[str, Any]
) -> bool:
    ours = fused(model, **options)
    exact = exact_step(model, x)
    plain = step(copy.deepcopy(model), x)
    got = step(ours, x)
    assert {row.backend for row in mbv2.summary(ours)} == {"cpu"}, mbv2.summary(ours)
    assert got.keys() == plain.keys()
    gradients = dict(model.named_parameters()).keys() | {"x"}
    eps = torch.finfo(x.dtype).eps
    worst = {bound: [eps, eps] for bound in (forward_bound, gradient_bound)}
    for name, expected in exact.items():
        assert got[name].dtype == plain[name].dtype and got[name].shape == plain[name].shape, name
        if not expected.is_floating_point():
            assert torch.equal(got[name], plain[name]), name
        elif float(expected.norm()) < 1e-10 * float(exact["y"].norm()):
            # Nothing but rounding noise, ours or theirs: a bias before a BatchNorm has no effect.
            assert float(got[name].double().norm()) <= max(float(plain[name].double().norm()), eps), name
        else:
            errors = [relative_error(found[name], expected) for found in (got, plain)]
            bound = gradient_bound if name in gradients else forward_bound
            assert errors[0] < bound, f"{name}: {errors[0]:.1e}"
            worst[bound] = [max(pair) for pair in zip(worst[bound], errors, strict=True)]
    return all(error <= 2 * unfused for error, unfused in worst.values())
