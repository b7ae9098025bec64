"""A training step (forward, loss, backward) timed and weighed: fused in both memory modes, and the unfused ways.

As for inference, the gradients are checked against float64 before anything is timed, and the contestants run in turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .suite import Progress, blocks, columns, no_progress
from .timing import SETTLE_SECONDS, CheckFailed, Timing, activation_peak, interleave

Step = Callable[[], Tensor]

#: The images on which gradients are checked: float64 convolutions with groups are very slow.
CHECKED_IMAGES = 2
#: A contestant's gradients may be this many times as far from float64 as eager's.
SLACK = 2.0
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
    without parameters and input."""

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
                generator = torch.Generator().manual_seed(1)
                weights = (
                    torch.randn(y.shape, generator=generator)
                    .to(y.device, y.dtype)
                    .contiguous(memory_format=torch.channels_last if y.dim() == 4 else torch.contiguous_format)
                )
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


def gradient_error(got: nn.Module, expected: nn.Module) -> float:
    """Relative error of all parameters' gradients as one vector."""
    pairs = [
        (a.grad.double(), b.grad)
        for a, b in zip(got.parameters(), expected.parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    ]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return (difference / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def check(label: str, model: nn.Module, x: Tensor, trainers: Sequence[Trainer]) -> dict[str, float]:
    """Gradient errors against float64 on a few of the images; raises `CheckFailed` where one is too large."""
    x = x[:CHECKED_IMAGES].detach().requires_grad_(x.requires_grad)
    exact, x64 = copy.deepcopy(model).double().train(), x.detach().double().requires_grad_(x.requires_grad)
    step_of(exact, x64)()
    errors = {}
    for trainer in (EAGER, *(t for t in trainers if t is not EAGER and not t.compiled)):
        candidate, image = trainer.prepare(model, x)
        step_of(candidate, image.requires_grad_(x.requires_grad))()
        errors[trainer.name] = gradient_error(candidate, exact)
    limit = max(SLACK * errors[EAGER.name], GRADIENT_BOUND[x.dtype])
    for trainer in trainers:
        if trainer.memory is not None and not trainer.compiled and not errors[trainer.name] <= limit:
            error = errors[trainer.name]
            raise CheckFailed(f"{label}: gradients of {trainer.name} are off by {error:.2e}, limit {limit:.2e}")
    return errors


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
    rows = [["", "step ms", "x fused", "kept MiB", "x fused", "peak MiB", "gradient error"]]
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
