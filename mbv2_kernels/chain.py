"""Runs of fused children of an `nn.Sequential` as one call.

A call of one block costs some 30 microseconds of Python and dispatch whatever its size, 17 blocks and their stem and
head a good part of what a fast CPU needs for the whole network. So `fuse` gives a Sequential that holds fused children
next to each other a forward of its own, which asks each child whether it would run fused now and runs those that say
yes, in their runs, by one op (`mbv2::chain_packed`); what lies between them stays in two small buffers. The others are
called as ever: those with hooks, in training, without a kernel. Slices, copies and single calls of the children know
nothing of it.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .backends import KERNEL_DTYPES, get_backend
from .fused_forward import FusedForward

_RUN = torch.ops.mbv2.chain_packed.default


class FusedChain:
    """Stands in for the `forward` of a Sequential (`fuse` sets it as an attribute, as `FusedForward`)."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    @property
    def __code__(self) -> Any:
        """Where a root module's forward is written: torch.export asks."""
        return type(self.block).forward.__code__

    def __call__(self, x: Any) -> Any:
        if torch.compiler.is_compiling() or not _runs_chains(x):
            return type(self.block).forward(self.block, x)
        packed: list[Tensor] = []
        steps: list[int] = []
        channels = x.shape[1]
        for child in self.block._modules.values():
            assert child is not None
            forward = child.__dict__.get("forward")
            step = None
            if isinstance(forward, FusedForward) and forward.in_channels == channels and _calls_forward_only(child):
                step = forward.step(x.dtype)
            if step is not None:
                packed.append(step[0])
                steps += step[1]
                channels = step[1][2]
                continue
            if packed:
                x = _RUN(x, packed, steps)
                packed, steps = [], []
            x = child(x)
            channels = x.shape[1] if _runs_chains(x) else -1  # what is no image fits no block
        return _RUN(x, packed, steps) if packed else x


def has_chain(module: nn.Module) -> bool:
    """A plain Sequential with at least two fused children next to each other."""
    if type(module).forward is not nn.Sequential.forward or "forward" in vars(module):
        return False
    fused = [m is not None and isinstance(vars(m).get("forward"), FusedForward) for m in module._modules.values()]
    return any(a and b for a, b in itertools.pairwise(fused))


def _runs_chains(x: Any) -> bool:
    """Whether x is what the op can take, and nothing is going on that wants to see every block's call."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype in KERNEL_DTYPES
        and x.dim() == 4
        and x.layout is torch.strided
        and not torch.is_grad_enabled()
        and get_backend() in ("auto", "cpu")
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and peek_interpreter_stack() is None
        and not _has_any_global_hook()
    )


def _calls_forward_only(child: nn.Module) -> bool:
    """Whether `child(x)` would call its forward and nothing else."""
    return (
        type(child).__call__ is nn.Module.__call__
        and child._compiled_call_impl is None
        and not child._forward_hooks
        and not child._forward_pre_hooks
        and not child._backward_hooks
        and not child._backward_pre_hooks
    )
