"""Errors of the fused network and of each of its blocks against fp64, beside those of the unfused one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .inputs import block_inputs

# The largest ||y - ref|| / ||ref|| allowed, ref in fp64 on the same rounded inputs and weights.
ERROR_BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

# What is kept between a block's products is rounded to bfloat16 by both paths: no bound that PyTorch exceeds itself.
BFLOAT16_SLACK = 1.5

# With fp16 accumulation: of a block, what it may be off by in bfloat16; of a network, so many times the unfused one's.
FP16_ACCUMULATION_BOUND = ERROR_BOUNDS[torch.bfloat16]
FP16_ACCUMULATION_SLACK = 10

Progress = Callable[[str, int, int], None]


def relative_error(y: Tensor, reference: Tensor) -> float:
    """||y - reference|| / ||reference|| in fp64; NaN where either has one, infinite where the shapes differ."""
    if y.shape != reference.shape:
        return float("inf")
    reference = reference.double()
    norm = reference.norm().item()
    error = (y.double() - reference).norm().item()
    return error / norm if norm != 0 else error


def error_limit(
    dtype: torch.dtype,
    unfused_error: float,
    terms: int,
    *,
    network: bool = False,
    fp16_accumulation: bool = False,
) -> float:
    """The error that a fused result may have: of a block, in no case more than `ERROR_BOUNDS` (in bfloat16
    `BFLOAT16_SLACK` times the error of the unfused path, where that is more: see below); and the largest of

    - twice the error of the unfused path in the same dtype;
    - 2^-24 sqrt(terms): a sum of `terms` numbers in float32, one after the other (see `summands`). Each addition rounds
      by up to 2^-24 of the sum so far, at random, so that squares add up. The unfused path alone is no measure: its
      error depends on the order in which oneDNN adds on this machine, and plain sums of the same folded weights were
      seen to err up to 2.6 times as much as it (0.2 to 0.6 times this bound), fused blocks up to 1.8 times (0.1 to 0.6
      times; every block of MobileNetV2, MobileNetV1 and EfficientNet-Lite0). A mistake costs far more: one tap of one
      channel out of 960 wrong by a hundredth is 1e-4;
    - half a unit in the last place: results have to be rounded.

    In bfloat16 the tier for it rounds what it keeps between products, as PyTorch rounds what it stores between layers.
    So both err alike (measured: 0.85 to 1.31 times), and where few pixels with little spread make PyTorch exceed the
    bound (8.5e-3, features.14 of MobileNetV2 on 2x2 pixels) no kernel that multiplies bfloat16 can keep it.

    Through a network errors grow with its depth, so that the bound of a block says nothing there.

    With fp16 accumulation, which trades exactness, `FP16_ACCUMULATION_BOUND`.
    """
    if fp16_accumulation:
        return max(FP16_ACCUMULATION_BOUND, FP16_ACCUMULATION_SLACK * unfused_error if network else 0.0)
    limit = max(2 * unfused_error, 2**-24 * terms**0.5)
    if not network:
        slack = BFLOAT16_SLACK if dtype is torch.bfloat16 else 0.0
        limit = min(limit, max(ERROR_BOUNDS[dtype], slack * unfused_error))
    return max(limit, torch.finfo(dtype).eps / 2)


def summands(model: nn.Module) -> int:
    """How many numbers are added up on the way to an output: of each convolution and linear layer one output's."""
    return sum(m.weight[0].numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


@dataclass(frozen=True)
class BlockCheck:
    """One fused block on the input that the unfused network gives it. Errors are relative, against fp64."""

    path: str
    class_name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    error: float
    unfused_error: float
    limit: float
    float32_error: float | None  # with float32 accumulation, where `error` is with float16's
    backend: str | None
    tier: str | None

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # false for NaN too


@dataclass(frozen=True)
class NetworkCheck:
    """The whole network; `top1` and `top5` are the parts of the images' first (five) classes that agree."""

    images: int
    error: float
    unfused_error: float
    limit: float
    float32_error: float | None
    top1: float
    top5: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class NotFused:
    """A candidate that `fuse` left alone, and why."""

    path: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """All that `verify` found."""

    blocks: tuple[BlockCheck, ...]
    network: NetworkCheck
    not_fused: tuple[NotFused, ...]

    @property
    def ok(self) -> bool:
        return self.network.ok and all(block.ok for block in self.blocks)


def _agreement(y: Tensor, reference: Tensor, k: int) -> float:
    k = min(k, reference.shape[1])
    mine, theirs = (t.double().topk(k, dim=1).indices for t in (y, reference))
    return (mine[:, :, None] == theirs[:, None, :]).any(dim=2).double().mean().item()


@torch.no_grad()
def verify(
    model: nn.Module,
    x: Tensor,
    progress: Progress = lambda text, done, total: None,
    *,
    fp16_accumulation: bool = False,
) -> Verification:
    """Compare `fuse(model)` with `model`, both with fp64, block by block and as a whole.

    `model` is an unfused eval-mode network that gives [N, classes] for x [N, 3, H, W] of its own dtype; it is copied,
    not changed. Each block gets the input that it gets in the unfused network, so that errors do not add up.
    fp16_accumulation: with `set_fp16_accumulation(True)`; and without, to compare.
    """
    from .. import fuse, set_fp16_accumulation, summary
    from ..patch import fused_parts, unfused_part

    fused = fuse(copy.deepcopy(model))
    parts = fused_parts(fused)
    total = len(parts) + 1
    progress("network", 0, total)
    exact = copy.deepcopy(model).double()

    def both(run: Callable[[Tensor], Tensor], x: Tensor, reference: Tensor) -> tuple[Tensor, float | None]:
        """The output, and the error with float32 accumulation if the output is with float16's."""
        if not fp16_accumulation:
            return run(x), None
        float32_error = relative_error(run(x), reference)
        set_fp16_accumulation(True)
        try:
            return run(x), float32_error
        finally:
            set_fp16_accumulation(False)

    reference, unfused_y = exact(x.double()), model(x)
    fused_y, float32_error = both(fused, x, reference)
    unfused_error = relative_error(unfused_y, reference)
    network = NetworkCheck(
        images=x.shape[0],
        error=relative_error(fused_y, reference),
        unfused_error=unfused_error,
        limit=error_limit(x.dtype, unfused_error, summands(model), network=True, fp16_accumulation=fp16_accumulation),
        float32_error=float32_error,
        top1=_agreement(fused_y, unfused_y, 1),
        top5=_agreement(fused_y, unfused_y, 5),
    )
    inputs = block_inputs(model, parts, x)
    measured = {}
    for done, path in enumerate(inputs, start=1):
        progress(path, done, total)
        reference = unfused_part(exact, path, parts[path])(inputs[path].double())
        y, float32_error = both(parts[path], inputs[path], reference)
        unfused_y = unfused_part(model, path, parts[path])(inputs[path].clone())
        unfused_error = relative_error(unfused_y, reference)
        limit = error_limit(x.dtype, unfused_error, summands(parts[path]), fp16_accumulation=fp16_accumulation)
        measured[path] = (tuple(y.shape), relative_error(y, reference), unfused_error, limit, float32_error)
    rows = {row.path: row for row in summary(fused)}  # asked last: only now do they know what ran them
    blocks = tuple(
        BlockCheck(
            path=path,
            class_name=rows[path].class_name,
            kind=rows[path].kind,
            input_shape=tuple(inputs[path].shape),
            output_shape=shape,
            error=error,
            unfused_error=unfused_error,
            limit=limit,
            float32_error=float32_error,
            backend=rows[path].backend,
            tier=rows[path].tier,
        )
        for path, (shape, error, unfused_error, limit, float32_error) in measured.items()
    )
    refused = tuple(NotFused(row.path, row.class_name, row.reason) for row in rows.values() if not row.fused)
    return Verification(blocks, network, refused)
