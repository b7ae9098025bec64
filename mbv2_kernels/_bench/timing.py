"""Interleaved timing of several ways to run the same network, after checking that they all do compute the same."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from ..models import count
from ..probe import DirectDepthwise
from .peers import Peer, PeerUnavailable, Run
from .verify import ERROR_BOUNDS, error_limit, relative_error, summands

# One sample lasts this long at least: short enough for many samples, long against the clock and a call's jitter.
SAMPLE_SECONDS = 2e-3
MIN_ROUNDS, MAX_ROUNDS = 7, 500
# Pause before each sample with several threads: pools that spin after their work (OpenMP, ONNX Runtime) would otherwise
# take the cores from the next contestant.
SETTLE_SECONDS = 2e-3
# A peer may order its sums as it likes, but an error beyond this many times the bound is another network.
PEER_SLACK = 10


class CheckFailed(Exception):
    """A contestant computes something else: no speed is reported."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over `samples` samples of `calls` calls each."""

    median: float
    minimum: float
    p20: float
    p80: float
    samples: int
    calls: int


@dataclass(frozen=True)
class Comparison:
    """All contestants on one network (or block) and one input, timed in turns."""

    label: str
    input_shape: tuple[int, ...]
    dtype: str
    threads: int
    multiply_adds: int
    bytes_moved: int
    timings: dict[str, Timing]
    errors: dict[str, float]
    unavailable: dict[str, str] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)  # held at a time in a call; where that can be measured

    def gflops(self, name: str) -> float:
        """Arithmetic rate with a multiply-add as 2 FLOP."""
        return 2e-9 * self.multiply_adds / self.timings[name].median

    def ratio(self, name: str, ours: str = "fused") -> float:
        """How many times as long `name` takes as `ours`."""
        return self.timings[name].median / self.timings[ours].median

    def fastest(self, names: Iterable[str]) -> str | None:
        """The fastest of `names` that was timed."""
        return min((n for n in names if n in self.timings), key=lambda n: self.timings[n].median, default=None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return (time.perf_counter() - start) / calls


@torch.no_grad()
def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    device: torch.device | None = None,
    settle: float = 0.0,
) -> dict[str, Timing]:
    """Time `runs` in turns, for about `seconds` altogether, the first one changing from round to round.

    Each sample follows one untimed call of the same contestant, so that none pays for the caches its predecessor left;
    `settle` is a pause in seconds before that.
    """
    device = device or torch.device("cpu")
    calls = {}
    round_seconds = 0.0
    for name, run in runs.items():
        estimate = min(_sample(run, 1, device) for _ in range(4))
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / estimate))
        round_seconds += estimate * (calls[name] + 1) + settle
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(seconds / round_seconds)))
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if settle:
                    time.sleep(settle)
                runs[name]()
                samples[name].append(_sample(runs[name], calls[name], device))
    finally:
        if collecting:
            gc.enable()
    timings = {}
    for name, values in samples.items():
        fifths = quantiles(values, n=5)
        timings[name] = Timing(median(values), min(values), fifths[0], fifths[-1], len(values), calls[name])
    return timings


def bytes_moved(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """The least a run must move: input and output once, every parameter once."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return x.numel() * x.element_size() + y.numel() * y.element_size() + weights


@torch.no_grad()
def check(label: str, peer: Peer, y: Tensor, reference: Tensor, limit: float) -> float:
    """The peer's error against fp64; raises `CheckFailed` if ours exceeds `limit`, or another's exceeds it by far (and
    ours, where it is told to trade exactness)."""
    error = relative_error(y, reference)
    if peer.reduced or not peer.ours:
        limit = PEER_SLACK * max(limit, ERROR_BOUNDS[y.dtype])
    if not error <= limit:
        raise CheckFailed(f"{label}: {peer.name} is off by {error:.2e} (relative, against fp64), limit {limit:.2e}")
    return error


@torch.no_grad()
def prepare(
    label: str, model: nn.Module, x: Tensor, peers: Sequence[Peer], threads: int, *, network: bool = False
) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """Prepared and checked contestants: their runs, their errors, and the reasons of those that cannot run."""
    unavailable: dict[str, str] = {}
    errors: dict[str, float] = {}
    runs: dict[str, Run] = {}
    with DirectDepthwise():
        reference = copy.deepcopy(model).double()(x.double())
    limit = error_limit(x.dtype, relative_error(model(x), reference), summands(model), network=network)
    for peer in peers:
        reason = peer.missing()
        if reason is None:
            try:
                run = peer.prepare(model, x, threads)
            except PeerUnavailable as error:
                reason = str(error)
        if reason is not None:
            unavailable[peer.name] = reason
            continue
        errors[peer.name] = check(label, peer, run(), reference, limit)
        runs[peer.name] = run
    return runs, errors, unavailable


@torch.no_grad()
def compare(
    label: str,
    model: nn.Module,
    x: Tensor,
    peers: Sequence[Peer],
    *,
    threads: int,
    seconds: float,
    network: bool = False,
    memory: Callable[[Run], int] | None = None,
) -> Comparison:
    """Check, then time, `peers` on `model` and `x` with `threads` threads; torch's own number is put back afterwards.

    `network`: the model is more than one block, and errors are judged as those of a network (`error_limit`). `memory`
    tells the bytes that a call holds at a time, weights and input not included.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs, errors, unavailable = prepare(label, model, x, peers, threads, network=network)
        timings = interleave(runs, seconds=seconds, device=x.device, settle=SETTLE_SECONDS if threads > 1 else 0.0)
        return Comparison(
            label=label,
            input_shape=tuple(x.shape),
            dtype=str(x.dtype).removeprefix("torch."),
            threads=threads,
            multiply_adds=count(model, x.shape).multiply_adds,
            bytes_moved=bytes_moved(model, x, model(x)),
            timings=timings,
            errors=errors,
            unavailable=unavailable,
            peak_bytes={name: memory(run) for name, run in runs.items()} if memory else {},
        )
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def activation_peak(run: Run) -> int:
    """The most bytes that one call of `run` holds at a time, weights and input not included.

    Of torch's CPU allocator and of what our kernels keep in the calling thread. What others take from elsewhere
    (oneDNN's scratchpads) shows only in the process's resident memory.
    """
    from torch.profiler import ProfilerActivity, profile

    from .. import _C

    run()  # first call: packing, caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak + _C.kept_bytes()
