"""Runs of fused children of an `nn.Sequential` as one call.

A call of one block costs some 20 microseconds of Python and dispatch whatever its size, 17 blocks and their stem and
head a good part of what a fast CPU needs for the whole network. So `fuse` gives a Sequential that holds fused children
next to each other a forward of its own, which asks each child whether it would run fused now and runs those that say
yes, in their runs, by one op (`mbv2::chain_packed`); what lies between them stays in two small buffers. The others are
called as ever: those with hooks, in training, without a kernel. Slices, copies and single calls of the children know
nothing of it. Sequentials among the children are looked into: a network in stages is one run.

The answers are kept as a `Plan` until one could be another: asking costs more than some blocks take. A plan that is
nothing but one run becomes a shortcut (see `shortcut`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import _C
from .backends import tier_of
from .composition import METHOD
from .fold import memo
from .fused_forward import FusedForward, FusedPair
from .shortcut import UNPLANNED, Look, is_image, is_quiet, shortcut, watch

_PACK = torch.ops.mbv2.pack_chain.default
_RUN = torch.ops.mbv2.chain_packed.default


class FusedChain:
    """Stands in for the `forward` of a Sequential (`fuse` sets it as an attribute, as `FusedForward`)."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.plan: Plan | None = None
        self.shortcut: _C.Shortcut | None = None  # if the plan comes down to one call of an op

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "plan": None, "shortcut": None}  # of the modules of one process; made anew when needed

    @property
    def __code__(self) -> Any:
        """Where a root module's forward is written: torch.export asks."""
        return type(self.block).forward.__code__

    def __call__(self, x: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.one_by_one(x)
        if self.shortcut is not None:
            y = self.shortcut(x)
            if y is not None:
                return y
        return self.closely(x)

    def closely(self, x: Any) -> Any:
        """`block` on x, whatever has changed."""
        if UNPLANNED or not is_quiet(x):
            return self.one_by_one(x)
        plan = self.plan
        if plan is None or not plan.holds(x.dtype):
            plan = self.plan = self.shortcut = None
            if not self.is_overridden():
                plan = self._plan_anew(x.dtype)
        return self.one_by_one(x) if plan is None else self.run(plan, x)

    def run(self, plan: Plan, x: Any) -> Any:
        """`block` on x as planned."""
        return plan.run(x)

    def one_call(self, plan: Plan) -> OneCall | None:
        """The same as one call, if it is no more than that."""
        run = plan.links[0] if len(plan.links) == 1 else None
        return OneCall(_RUN, (run.chain,), run.in_channels) if isinstance(run, Run) else None

    def one_by_one(self, x: Any) -> Any:
        """As without chains."""
        return type(self.block).forward(self.block, x)

    def children(self) -> Iterable[nn.Module | None]:
        """What is called, in this order."""
        return self.block._modules.values()

    def is_overridden(self) -> bool:
        """Whether something other than calling `children` is to be done now."""
        return False

    def looks(self) -> Iterator[Look]:
        """What `children` and `is_overridden` depend on."""
        yield Look(self.block, children=tuple(self.block._modules.items()))

    def _plan_anew(self, dtype: torch.dtype) -> Plan:
        """Asks every child, and keeps the answers if all that are fused said yes."""
        plan = Plan(self, dtype)
        if plan.complete:
            plan = Plan(self, dtype, watched=plan)
            if plan.complete:
                self.plan = plan
                call = self.one_call(plan)
                self.shortcut = None if call is None else plan.shortcut(*call)
        return plan


class FusedFeatures(FusedChain):
    """Stands in for a `forward_features` that calls submodules in a row, some of them as `FusedPair`s."""

    def __init__(self, pairs: Sequence[FusedPair]) -> None:
        self.composition = pairs[0].composition
        super().__init__(self.composition.owner)
        self.pairs = {next(iter(pair.block._modules)): pair for pair in pairs}

    def one_by_one(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or self.is_overridden():  # torch.fx finds the pairs in no network
            return getattr(type(self.block), METHOD)(self.block, x)
        for child in self.children():
            x = child(x)
        return x

    def children(self) -> Iterator[nn.Module]:
        steps = iter(self.composition.steps)
        for name, module in steps:
            if name in self.pairs:
                next(steps)  # the norm
                yield self.pairs[name].block
            else:
                yield module

    def is_overridden(self) -> bool:
        reason = self.composition.overridden()
        if reason is None and _has_any_global_hook():
            reason = "global module hooks would see modules that are not the network's"
        if reason is not None and not torch.compiler.is_compiling():
            for pair in self.pairs.values():
                pair.note_refusal(reason)
        return reason is not None

    def looks(self) -> Iterator[Look]:
        yield from super().looks()
        if self.composition.flag is not None:
            yield Look(self.block, settings=((self.composition.flag, False),))


class OneCall(NamedTuple):
    """op(x, *arguments), for images of so many channels and at most so many images."""

    op: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    channels: int
    most_images: int = 2**31


class Plan:
    """What a chain does with images of one dtype.

    complete: every child that is fused would run fused. watched: an earlier plan of the same chain, which says what to
    watch; the watch begins before the children are asked, so that what changes meanwhile is noticed.
    """

    def __init__(self, chain: FusedChain, dtype: torch.dtype, watched: Plan | None = None) -> None:
        self.dtype = dtype
        self.complete = True
        self._tier = tier_of(dtype)
        self._epoch = memo.epoch
        self._watch: _C.Watch | None = None
        if watched is not None:
            try:
                self._watch = watch(watched._looks(chain))
            except RuntimeError:  # tensors made in inference mode have no version
                self.complete = False
        self.links: list[nn.Module | Run] = []
        self._containers: list[nn.Module] = []
        for child in _flattened(chain.children(), self._containers):
            self._add(child)

    def _add(self, child: nn.Module) -> None:
        forward = child.__dict__.get("forward")
        if not isinstance(forward, FusedForward):
            self.links.append(child)
            if is_sequential(child) and child._modules:  # one with hooks, for now
                self.complete = False
            return
        step = forward.step(self.dtype) if calls_forward_only(child) else None
        if step is None:
            self.links.append(child)
            self.complete = False
            return
        last = self.links[-1] if self.links else None
        if not isinstance(last, Run) or last.out_channels != forward.in_channels:
            last = Run()
            self.links.append(last)
        last.add(child, forward, *step)

    def _looks(self, chain: FusedChain) -> Iterator[Look]:
        yield from chain.looks()
        for container in self._containers:
            yield Look(container, True, vars(container).get("forward"), tuple(container._modules.items()))
        for link in self.links:
            if isinstance(link, Run):
                for child, forward in zip(link.children, link.forwards, strict=True):
                    yield Look(child, True, forward)
                    yield from forward.step_looks()

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether all that was asked would be answered the same again."""
        assert self._watch is not None
        return (
            self.dtype is dtype
            and self._epoch is memo.epoch
            and self._tier == tier_of(dtype)
            and self._watch.unchanged()
        )

    def shortcut(
        self, op: Callable[..., Tensor], arguments: Sequence[Any], channels: int, most_images: int
    ) -> _C.Shortcut:
        """To `OneCall`, while the plan holds."""
        assert self._watch is not None
        return shortcut(op, arguments, self._watch, self._epoch, self.dtype, channels=channels, most_images=most_images)

    def run(self, x: Any) -> Any:
        """`chain.block` on x."""
        for link in self.links:
            if not isinstance(link, Run) or link.takes(x, self.dtype):
                x = link(x)
            else:
                for child in link.children:
                    x = child(x)
        return x


class Run:
    """Fused children next to each other, as one call of the op."""

    def __init__(self) -> None:
        self.children: list[nn.Module] = []
        self.forwards: list[FusedForward] = []
        self.packed: list[Tensor] = []
        self.steps: list[int] = []
        self.out_channels = 0

    def add(self, child: nn.Module, forward: FusedForward, packed: Tensor, numbers: list[int]) -> None:
        self.children.append(child)
        self.forwards.append(forward)
        self.packed.append(packed)
        self.steps += numbers
        self.out_channels = numbers[2]

    @property
    def in_channels(self) -> int:
        return self.forwards[0].in_channels

    @functools.cached_property
    def chain(self) -> Tensor:
        """What the op runs; asked for when all children are there."""
        return _PACK(self.packed, self.steps)

    def takes(self, x: Any, dtype: torch.dtype) -> bool:
        return is_image(x) and x.dtype is dtype and x.shape[1] == self.in_channels

    def __call__(self, x: Tensor) -> Tensor:
        return _RUN(x, self.chain)


def has_chain(module: nn.Module) -> bool:
    """A plain Sequential that calls at least two fused modules one after the other."""
    if not is_sequential(module) or "forward" in vars(module):
        return False
    fused = [isinstance(vars(m).get("forward"), FusedForward) for m in _flattened(module._modules.values(), [])]
    return any(a and b for a, b in itertools.pairwise(fused))


def _flattened(children: Iterable[nn.Module | None], containers: list[nn.Module]) -> Iterator[nn.Module]:
    """`children`, and in place of the Sequentials among them what those call, of Identities nothing.

    Sequentials and Identities are added to `containers`.
    """
    for child in children:
        assert child is not None
        if type(child) is nn.Identity and calls_forward_only(child) and "forward" not in vars(child):
            containers.append(child)
        elif is_sequential(child) and child._modules and calls_forward_only(child):
            containers.append(child)
            yield from _flattened(child._modules.values(), containers)
        else:
            yield child


def is_sequential(module: nn.Module) -> bool:
    """One that calls its children in their order and does nothing else."""
    return type(module).forward is nn.Sequential.forward and isinstance(vars(module).get("forward"), FusedChain | None)


def calls_forward_only(child: nn.Module) -> bool:
    """Whether `child(x)` would call its forward and nothing else."""
    return (
        type(child).__call__ is nn.Module.__call__
        and child._compiled_call_impl is None
        and not child._forward_hooks
        and not child._forward_pre_hooks
        and not child._backward_hooks
        and not child._backward_pre_hooks
    )
