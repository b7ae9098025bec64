"""The classifier behind the last convolution: `nn.Linear` on few rows, which is bound by reading its weights.

torch's product reads them with one thread and one stream, and takes as long as a whole block of the network; the op
`mbv2::linear` reads several rows of weights at once, on all threads. Weights stay where they are: nothing is packed or
kept, so that nothing can be stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .chain import runs_at_once

MOST_ROWS = 8  # from 16 on a product in register tiles, which torch's is, is as fast or faster

_LINEAR = torch.ops.mbv2.linear.default
_PLAIN = (nn.Parameter, Tensor)


@dataclass(frozen=True)
class ClassifierStructure:
    """An `nn.Linear` behind the last convolution of a network."""

    block: nn.Linear
    kind: str = "classifier"


class FusedClassifier:
    """Stands in for the `forward` of an `nn.Linear` (`fuse` sets it as an attribute, as `FusedForward`)."""

    kind = "classifier"

    def __init__(self, structure: ClassifierStructure, path: str = "") -> None:
        self.block = structure.block
        self.path = path
        self.last_reason: str | None = None  # why torch's own ran, None: the kernel did
        self.last_run: tuple[str, str] | None = None

    @property
    def __code__(self) -> Any:
        """Where a root module's forward is written: torch.export asks."""
        return type(self.block).forward.__code__

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return type(self.block).forward(self.block, x, *args, **kwargs)
        weight, bias = self.block.weight, self.block.bias
        self.last_reason = self._refused(x, weight, bias) if not (args or kwargs) else "called with several arguments"
        if self.last_reason is not None:
            return type(self.block).forward(self.block, x, *args, **kwargs)
        self.last_run = "cpu", _C.active_tier()
        return _LINEAR(x, weight, bias)

    def _refused(self, x: Any, weight: Tensor, bias: Tensor | None) -> str | None:
        if not runs_at_once(x) or x.dim() != 2:
            return "the kernel takes [N, features] on the CPU without gradients"
        if x.shape[0] > MOST_ROWS:
            return f"{x.shape[0]} rows, with more than {MOST_ROWS} torch's product is as fast"
        return self.refused_weights(x.dtype, x.shape[1], weight, bias)

    @staticmethod
    def refused_weights(dtype: torch.dtype, features: int, weight: Tensor, bias: Tensor | None) -> str | None:
        """Why the kernel does not take these weights for x [N, features] of `dtype`; None if it does."""
        tensors = (weight,) if bias is None else (weight, bias)
        if any(type(t) not in _PLAIN or t.dtype is not dtype or not t.is_cpu for t in tensors):
            return "weights of another type or on another device than x"
        return None if weight.shape[1] == features else "x does not fit"

    def refusal(self) -> str | None:
        """Nothing that could be seen before a call stands against the kernel."""
        return None

    def what_ran(self) -> tuple[str, str] | None:
        """Backend and tier of the last run by the kernel."""
        return self.last_run
