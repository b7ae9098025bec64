"""A training step (forward, loss, backward) timed and weighed: fused in both memory modes, and the unfused ways.

As for inference, the gradients are checked against float64 before anything is timed, and the contestants run in turns.
They are checked block by block: a deep network with batch statistics and random weights is chaotic, and after its
backward the gradients of two unfused runs with different sums differ by more than half of themselves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .suite import Progress, blocks, columns, no_progress
from .timing import SETTLE_SECONDS, CheckFailed, Timing, activation_peak, interleave

Step = Callable[[], Tensor]

#: Gradients are checked on about so many pixels of a block's input, in squares of at most CHECKED_SIZE: float64
#: convolutions are very slow, and the more values, the more of them come to lie at an edge of a clamp.
CHECKED_PIXELS, CHECKED_SIZE = 1568, 28
#: A fused contestant's gradients may be this many times as far from float64 as unfused ones are.
SLACK = 2.0
#: A value that rounds across such an edge changes a gradient by all of itself, fused or not. With another input it does
#: not: what counts is the least error with up to so many inputs. In 16 bits such values are always there.
ATTEMPTS = {torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}
GRADIENT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Trainer:
    """A way to train a network. `memory`: fused with it; None: unfused."""

    name: str
    memory: str | None = None
    channels_last: bool = True
    compiled: bool = False

    def prepare(self, model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
        """An own copy of `model` in training mode, and its input; `model` is left as it is."""
        from .. import fuse

        model = copy.deepcopy(model).train()
        if self.channels_last:
            model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        if self.memory is not None:
            fuse(model, memory=self.memory)
        if self.compiled:
            torch.compiler.reset()  # it gives up after a number of blocks, and runs the others eagerly
            model = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        return model, x


FUSED = Trainer("fused", memory="fast")
LEAN = Trainer("fused lean", memory="lean")
EAGER = Trainer("eager", channels_last=False)
CHANNELS_LAST = Trainer("channels_last")
COMPILED = Trainer("torch.compile", compiled=True)
TRAINERS = (FUSED, LEAN, EAGER, CHANNELS_LAST, COMPILED)


@dataclass(frozen=True)
class TrainingComparison:
    """All contestants on one network or block. Bytes: kept for backward, and the most held at a time in a step, both
    without parameters and input. Errors: the largest of a gradient in any block."""

    label: str
    input_shape: tuple[int, ...]
    timings: dict[str, Timing]
    saved: dict[str, int]
    peak: dict[str, int]
    errors: dict[str, float]
    unavailable: dict[str, str] = field(default_factory=dict)


def step_of(model: nn.Module, x: Tensor) -> Step:
    """One training step without the optimiser; returns the loss."""
    needs_grad = x.requires_grad  # of a block: gradients flow on to the layers before it
    weights = None

    def run() -> Tensor:
        nonlocal weights
        with torch.enable_grad():
            for parameter in model.parameters():
                parameter.grad = None
            y = model(x.detach().requires_grad_(needs_grad))
            if weights is None:
                weights = _random_like(y)
            loss = (y * weights).sum()
            loss.backward()
        return loss.detach()

    return run


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward of one forward, each storage once; parameters and x do not count."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    seen: dict[int, int] = {}
    kept = []  # alive until the end, or a second tensor could come to lie where a first one was

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x.detach().requires_grad_(x.requires_grad))
    del y
    return sum(seen.values())


def _random_like(y: Tensor) -> Tensor:
    """Always the same numbers."""
    numbers = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    return numbers.contiguous(memory_format=torch.channels_last if y.dim() == 4 else torch.contiguous_format)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of x and of the parameters, for a random gradient of the output."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = model(x)
        y.backward(_random_like(y))
    found = {"x": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    return {name: grad for name, grad in found.items() if grad is not None}


def gradient_error(got: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The largest error of a gradient, relative to its size, or to a tenth of the largest one's.

    Some should vanish, as that of a bias before a BatchNorm, or almost, as that of a scale there: they are rounding.
    """
    sizes = {name: float(grad.norm()) for name, grad in exact.items()}
    least = max(sizes.values()) / 10
    return max(float((got[name].double() - grad).norm()) / max(sizes[name], least) for name, grad in exact.items())


def check(label: str, model: nn.Module, x: Tensor, trainers: Sequence[Trainer]) -> dict[str, float]:
    """The largest error of a gradient in any block of `model`, for eager and for each trainer that is not compiled.

    A block gets a part of the input that it has in the network. Raises `CheckFailed` where a fused one is off by more
    than the bound, and by more than twice as much as every unfused one.
    """
    unfused = (EAGER, CHANNELS_LAST)
    checked = (*unfused, *(t for t in trainers if t not in unfused and not t.compiled))
    worst = {trainer.name: 0.0 for trainer in checked}
    bound = GRADIENT_BOUND[x.dtype]
    for path, block, block_input in blocks(model, x.detach()):
        part = block_input[:, :, :CHECKED_SIZE, :CHECKED_SIZE]
        part = part[: math.ceil(CHECKED_PIXELS / part[0, 0].numel())]
        errors = {trainer.name: math.inf for trainer in checked}
        for attempt in range(ATTEMPTS[x.dtype]):
            # Not a multiple of it: a BatchNorm takes that away, and the same values lie at the same edges.
            image = part + attempt / 64 * part.std(correction=0) * _random_like(part)
            exact = gradients(copy.deepcopy(block).double().train(), image.double())
            for t in checked:
                errors[t.name] = min(errors[t.name], gradient_error(gradients(*t.prepare(block, image)), exact))
            if max(errors.values()) <= bound:
                break
        limit = max(bound, *(SLACK * errors[t.name] for t in unfused))
        for t in checked:
            if t.memory is not None and not errors[t.name] <= limit:
                error = errors[t.name]
                raise CheckFailed(f"{label}, block {path}: gradients of {t.name} off by {error:.2e}, limit {limit:.2e}")
        worst = {name: max(error, errors[name]) for name, error in worst.items()}
    return worst


def compare_training(
    label: str, model: nn.Module, x: Tensor, trainers: Sequence[Trainer], *, threads: int, seconds: float
) -> TrainingComparison:
    """Check, weigh and time `trainers` with `threads` threads; torch's own number is put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        errors = check(label, model, x, trainers)
        runs: dict[str, Step] = {}
        saved: dict[str, int] = {}
        peak: dict[str, int] = {}
        unavailable: dict[str, str] = {}
        for trainer in trainers:
            candidate, image = trainer.prepare(model, x)
            image = image.detach().requires_grad_(x.requires_grad)
            run = step_of(candidate, image)
            try:
                run()
            except Exception as error:
                if not trainer.compiled:
                    raise
                unavailable[trainer.name] = f"torch.compile failed: {str(error).splitlines()[0]}"
                continue
            saved[trainer.name] = saved_bytes(candidate, image)
            peak[trainer.name] = activation_peak(run)
            runs[trainer.name] = run
        settle = SETTLE_SECONDS if threads > 1 else 0.0
        timings = interleave(runs, seconds=seconds, device=x.device, settle=settle)
        return TrainingComparison(label, tuple(x.shape), timings, saved, peak, errors, unavailable)
    finally:
        torch.set_num_threads(before)


def compare_training_blocks(
    model: nn.Module,
    x: Tensor,
    trainers: Sequence[Trainer],
    *,
    threads: int,
    seconds: float,
    progress: Progress = no_progress,
) -> list[TrainingComparison]:
    """`compare_training` for each block, with a gradient for its input, `seconds` each."""
    todo = blocks(model, x)
    results = []
    for done, (path, block, block_input) in enumerate(todo):
        progress(path, done, len(todo))
        block_input.requires_grad_()
        results.append(compare_training(path, block, block_input, trainers, threads=threads, seconds=seconds))
    return results


def training_table(comparisons: Sequence[TrainingComparison]) -> str:
    """A line for each contestant on each network or block, times and bytes also in units of the fused ones'."""
    rows = [["", "step ms", "x fused", "kept MiB", "x fused", "peak MiB", "worst gradient error"]]
    for c in comparisons:
        rows.append([f"{c.label} {'x'.join(map(str, c.input_shape))}", *[""] * 6])
        for name, timing in c.timings.items():
            error = f"{c.errors[name]:.1e}" if name in c.errors else "-"
            rows.append(
                [
                    f"  {name}",
                    f"{1e3 * timing.median:.2f}",
                    f"{timing.median / c.timings[FUSED.name].median:.2f}",
                    f"{c.saved[name] / 2**20:.2f}",
                    f"{c.saved[name] / c.saved[FUSED.name]:.2f}",
                    f"{c.peak[name] / 2**20:.1f}",
                    error,
                ]
            )
    return columns(rows)
