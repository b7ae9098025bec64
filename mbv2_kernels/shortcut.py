"""The short way through a call of fused modules whose weights are packed: one look whether all is as it was, one op.

What a call asks before it runs (is anything about to differentiate, trace or listen? do modules, hooks and tensors look
as they did?) costs more than a small block: in Python, and after the kernels have run through the caches, where nothing
that Python needs is left, tens of microseconds for every few lines. So a call that has asked everything once keeps the
answers in a `_C.Shortcut` (csrc/shortcut.h), which compares them in C++ and then calls the op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from . import _C, backends
from .backends import KERNEL_DTYPES, get_backend
from .fold import memo

#: Why nothing is planned here and every call asks for itself, if that is so.
UNPLANNED = "" if hasattr(Tensor, "__dlpack_c_exchange_api__") else "this torch has no DLPack interface for C"

_Question = tuple[Callable[..., Any], tuple[Any, ...]]
_Variable = tuple[dict[str, Any], str, Any]  # where its value has to be the same: csrc/shortcut.h

# What says whether anything is going on that wants to see more than one op for many modules: all answer falsely if not.
_TRAINING_QUESTIONS: tuple[_Question, ...] = (
    (torch._C._is_any_autocast_enabled, ()),
    (torch._C._get_tracing_state, ()),
    (peek_interpreter_stack, ()),
    (_has_any_global_hook, ()),
)
_QUESTIONS = ((torch.is_grad_enabled, ()), *_TRAINING_QUESTIONS)


class Look(NamedTuple):
    """What a module looks like, as `_C.Watch` takes it (csrc/watch.h)."""

    module: nn.Module
    plain: bool = False  # no hooks, and on the instance this forward or none
    forward: object = None
    children: tuple[tuple[str, nn.Module | None], ...] = ()
    settings: tuple[tuple[Any, ...], ...] = ()  # (name, value); (name,): not on the instance
    present: tuple[str, ...] = ()  # buffers
    tensors: tuple[tuple[str, str], ...] = ()  # "_parameters" or "_buffers", name
    moving: tuple[tuple[str, str], ...] = ()  # the same, but what is in them may change


def watch(looks: Iterable[Look]) -> _C.Watch:
    """Tells in a fraction of the time whether all still looks as now; False may be a false alarm.

    Raises RuntimeError for tensors that cannot be watched: made in inference mode, or in a torch whose tensors lack
    DLPack's interface for C.
    """
    merged: dict[nn.Module, Look] = {}
    for look in looks:
        seen = merged.get(look.module)
        if seen is not None:
            forward, children = look.forward or seen.forward, look.children or seen.children
            look = Look(look.module, look.plain or seen.plain, forward, children, *map(add, seen[4:], look[4:]))
        merged[look.module] = look
    return _C.Watch(merged.values())


def is_image(x: Any) -> bool:
    """Whether the packed ops can take x, if dtype and channels fit."""
    return type(x) is Tensor and x.is_cpu and x.dim() == 4 and x.layout is torch.strided


def is_quiet(x: Any, questions: Sequence[_Question] = _QUESTIONS) -> bool:
    """Whether x is what the packed ops can take, and nothing is going on that wants to see every module's call."""
    return (
        is_image(x)
        and x.dtype in KERNEL_DTYPES
        and get_backend() in ("auto", "cpu")
        and forward_ad._current_level < 0
        and not any(function(*arguments) for function, arguments in questions)
    )


def shortcut(
    op: Callable[..., Tensor],
    arguments: Sequence[Any],
    watch: _C.Watch,
    epoch: object,
    dtype: torch.dtype,
    *,
    channels: int,
    most_images: int = 2**31,
) -> _C.Shortcut:
    """A function of x that is op(x, *arguments), or None where that may not be all there is to do.

    watch: began before the questions were asked that made the op right. epoch: the memo's at that time. dtype, channels
    and most_images: which x it is for. `is_quiet` has to have said yes.
    """
    variables: list[_Variable] = [(vars(memo), "epoch", epoch)]
    if dtype is torch.float16:  # `backends.tier_of`; the rest of it is in csrc/shortcut.h
        variables.append((vars(backends), "_fp16_accumulation", backends._fp16_accumulation))
    return _shortcut(op, arguments, (most_images, channels), dtype, _QUESTIONS, variables, watch)


def training_shortcut(step: Callable[[Tensor], Tensor | None], watch: _C.Watch, x: Tensor) -> _C.Shortcut:
    """The same for a step of training on images like x, where gradients may be on and no memo is asked."""
    variables = [(vars(backends), "_backend", backends._backend)]
    return _shortcut(step, (), (2**31, x.shape[1]), x.dtype, _TRAINING_QUESTIONS, variables, watch)


def _shortcut(
    op: Callable[..., Tensor | None],
    arguments: Sequence[Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    questions: Sequence[_Question],
    variables: Sequence[_Variable],
    watch: _C.Watch,
) -> _C.Shortcut:
    images = torch.empty_strided((*shape, 0, 0), (0, 0, 0, 0), dtype=dtype, device="cpu")
    level = (vars(forward_ad), "_current_level", forward_ad._current_level)
    return _C.Shortcut(op, arguments, images, questions, [*variables, level], watch)


def is_quiet_training(x: Any) -> bool:
    """`is_quiet` for a step of training."""
    return is_quiet(x, _TRAINING_QUESTIONS)
