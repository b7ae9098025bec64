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

Progress = Callable[[str, int, int], None]


def relative_error(y: Tensor, reference: Tensor) -> float:
    """||y - reference|| / ||reference|| in fp64; NaN where either has one, infinite where the shapes differ."""
    if y.shape != reference.shape:
        return float("inf")
    reference = reference.double()
    norm = reference.norm().item()
    error = (y.double() - reference).norm().item()
    return error / norm if norm != 0 else error


def error_limit(dtype: torch.dtype, unfused_error: float, *, network: bool = False) -> float:
    """The error a fused result may have: twice that of the unfused path in the same dtype, and no more than the bound.

    The bound is one for a block; through a network errors grow with its depth, fused or not, and only the comparison
    with the unfused path says something. Half a unit in the last place is always allowed: results have to be rounded.
    """
    limit = 2 * unfused_error if network else min(2 * unfused_error, ERROR_BOUNDS[dtype])
    return max(limit, torch.finfo(dtype).eps / 2)


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
def verify(model: nn.Module, x: Tensor, progress: Progress = lambda text, done, total: None) -> Verification:
    """Compare `fuse(model)` with `model`, both with fp64, block by block and as a whole.

    `model` is an unfused eval-mode network that gives [N, classes] for x [N, 3, H, W] of its own dtype; it is copied,
    not changed. Each block gets the input that it gets in the unfused network, so that errors do not add up.
    """
    from .. import fuse, summary

    fused = fuse(copy.deepcopy(model))
    paths = [row.path for row in summary(fused) if row.fused]
    total = len(paths) + 1
    progress("network", 0, total)
    exact = copy.deepcopy(model).double()
    reference, unfused_y, fused_y = exact(x.double()), model(x), fused(x)
    unfused_error = relative_error(unfused_y, reference)
    network = NetworkCheck(
        images=x.shape[0],
        error=relative_error(fused_y, reference),
        unfused_error=unfused_error,
        limit=error_limit(x.dtype, unfused_error, network=True),
        top1=_agreement(fused_y, unfused_y, 1),
        top5=_agreement(fused_y, unfused_y, 5),
    )
    inputs = block_inputs(model, paths, x)
    measured = {}
    for done, path in enumerate(inputs, start=1):
        progress(path, done, total)
        y = fused.get_submodule(path)(inputs[path])
        reference = exact.get_submodule(path)(inputs[path].double())
        unfused_error = relative_error(model.get_submodule(path)(inputs[path].clone()), reference)
        measured[path] = (tuple(y.shape), relative_error(y, reference), unfused_error)
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
            limit=error_limit(x.dtype, unfused_error),
            backend=rows[path].backend,
            tier=rows[path].tier,
        )
        for path, (shape, error, unfused_error) in measured.items()
    )
    refused = tuple(NotFused(row.path, row.class_name, row.reason) for row in rows.values() if not row.fused)
    return Verification(blocks, network, refused)
