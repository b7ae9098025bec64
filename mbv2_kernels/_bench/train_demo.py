"""`mbv2-kernels train-demo`: the fused network learns real pictures as the unfused one does.

A CIFAR-style MobileNetV2 (first strides 1) on scikit-learn's 1797 handwritten digits, enlarged to 32 x 32: fused in
both memory modes, and unfused in several ways, all from the same weights, batches and shifts. Unfused runs differ among
themselves, because the order of torch's sums depends on the number of threads and on the memory format, and training
amplifies every rounding: after some steps two runs have nothing but their course in common. What the fused run differs
by is judged by that spread.

Such curves show that a network learns, not that its gradients are exact: with the batch statistics' part left out of
every gradient of a block's input, accuracy (99.16 %) and distance of the curves (0.279, with it 0.283) were within the
spread. Therefore gradients with the trained weights are compared with float64 as well, block by block.

Under torchrun the processes share every batch (DistributedDataParallel), and the fused network its statistics
(SyncBatchNorm).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import fuse, models, summary, unfuse
from .inputs import InputError
from .machine import machine
from .suite import columns, write_json
from .timing import CheckFailed
from .training import EAGER, FUSED, GRADIENT_BOUND, LEAN, SLACK, check

SIZE = 32
#: The paper's table 2 with the first two strides 1 (the other is the stem's), as is usual for images of 32 x 32.
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

# The recipe is the usual one for small pictures: SGD with Nesterov momentum, the learning rate rising over the first
# epochs and then falling as a cosine, no weight decay on BatchNorms and biases, pictures shifted at random.
LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
WARM_UP_EPOCHS = 2
SHIFT = 2  # pixels, at most, in each direction

SMOOTHED = 10  # steps that a point of a curve is the mean of
SPREAD_SLACK = 1.5
ACCURACY = 0.98
#: Shares of right answers among 359 pictures, near 99 %, differ by 0.7 % (one standard deviation) by chance.
ACCURACY_SLACK = 0.01


@dataclass(frozen=True)
class Way:
    """A way to train the network. `memory` "fast" or "lean": fused; None: unfused."""

    name: str
    threads: int
    memory: str | None = None
    channels_last: bool = True


@dataclass(frozen=True)
class Run:
    """One training: the loss of each step, the share of test pictures it gets right, seconds, what ran the blocks."""

    name: str
    losses: list[float]
    accuracy: float
    seconds: float
    backends: str


@dataclass(frozen=True)
class Data:
    """Pictures [N, 3, 32, 32] and labels [N], to learn from and to test on."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits(images: int | None = None) -> Data:
    """scikit-learn's digits, a fifth of them for the test; `images`: learn from the first so many only."""
    if importlib.util.find_spec("sklearn") is None:
        raise InputError("train-demo needs scikit-learn, which is not installed: pip install '.[bench]'")
    from sklearn import datasets

    found = datasets.load_digits()
    x = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
    x = nn.functional.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False).repeat(1, 3, 1, 1)
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 5], order[len(x) // 5 :][:images]
    return Data((x[train], y[train]), (x[test], y[test]))


def network(width: float) -> nn.Module:
    """Always the same random weights."""
    torch.manual_seed(0)
    return models.mobilenet_v2(
        width_mult=width, num_classes=10, dropout=0.0, inverted_residual_setting=BLOCKS, stem_stride=1
    )


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture [3, 32, 32] moved by up to SHIFT pixels; what comes in from outside is background."""
    places = torch.randint(2 * SHIFT + 1, (len(images), 2), generator=generator).tolist()
    padded = nn.functional.pad(images, [SHIFT] * 4, value=-1)
    return torch.stack([image[:, y : y + SIZE, x : x + SIZE] for image, (y, x) in zip(padded, places, strict=True)])


def train(
    way: Way, width: float, data: Data, *, epochs: int, batch: int, progress: Callable[[str, int, int], None]
) -> tuple[Run, nn.Module]:
    """The record, and the trained network."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(way.threads)
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    model = network(width).to(memory_format=layout)
    wrapped = nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    if way.memory is not None:
        if processes > 1:
            # After DistributedDataParallel, which refuses SyncBatchNorm on CPU. Torch's own does not run there, but
            # every BatchNorm of this network is in a part that is fused.
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        fuse(model, memory=way.memory)
    images, labels = data.train
    epoch_steps = len(images) // batch
    steps = epochs * epoch_steps
    optimiser = _optimiser(wrapped)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, epoch_steps, steps))
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    start = time.perf_counter()
    try:
        for _ in range(epochs):
            for chosen in torch.randperm(len(images), generator=generator).split(batch)[:epoch_steps]:
                x, y = (t[rank::processes] for t in (shifted(images[chosen], generator), labels[chosen]))
                loss = nn.functional.cross_entropy(wrapped(x.contiguous(memory_format=layout)), y)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                losses.append(_mean_over_processes(loss.detach()))
                progress(way.name, len(losses), steps)
        seconds = time.perf_counter() - start
        fused = way.memory is not None
        backends = ", ".join(sorted({row.backend or "-" for row in summary(model)})) if fused else "original modules"
        return Run(way.name, losses, accuracy(model, data), seconds, backends), model
    finally:
        torch.set_num_threads(before)


def _optimiser(model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    weights, others = ([p for p in parameters if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True)


def _rate(step: int, epoch_steps: int, steps: int) -> float:
    """The share of the learning rate at a step."""
    warm_up = min(WARM_UP_EPOCHS * epoch_steps, steps // 2)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def accuracy(model: nn.Module, data: Data) -> float:
    images, labels = data.test
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def _mean_over_processes(loss: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return float(loss)


def curve(run: Run) -> Tensor:
    """The logarithm of the loss, smoothed: float64 [points]."""
    losses = torch.tensor(run.losses, dtype=torch.float64)
    return losses.unfold(0, min(SMOOTHED, len(losses)), 1).mean(1).log()


def distance(a: Run, b: Run) -> float:
    """Between two runs' curves, root mean square over the steps: 0.1 says that one loss is 10 % larger."""
    return float((curve(a) - curve(b)).square().mean().sqrt())


def judge(fused: Run, unfused: Sequence[Run]) -> list[tuple[bool, str]]:
    """What must hold for a fused run, and a line on how it is.

    If fusing is nothing but another order of sums, then the fused run is as far from an unfused one, on average, as two
    unfused ones are from each other. With few pairs the two averages differ by chance, therefore the slack.
    """
    right = [run.accuracy for run in unfused]
    mean, slack = sum(right) / len(right), max(max(right) - min(right), ACCURACY_SLACK)
    found = [
        (
            fused.accuracy > ACCURACY and abs(fused.accuracy - mean) <= slack,
            f"test accuracy {fused.accuracy:.2%}: must be above {ACCURACY:.0%}, "
            f"and within {slack:.1%} of the unfused runs' mean {mean:.2%}",
        )
    ]
    pairs = [distance(a, b) for i, a in enumerate(unfused) for b in unfused[:i]]
    if pairs:
        ours, theirs = sum(distance(fused, run) for run in unfused) / len(unfused), sum(pairs) / len(pairs)
        found.append(
            (
                ours <= SPREAD_SLACK * theirs,
                f"distance of the loss curves: {ours:.3f} from the unfused runs, these from each other {theirs:.3f}: "
                f"must be within {SPREAD_SLACK:g} times that",
            )
        )
    return found


def judge_gradients(model: nn.Module, data: Data) -> tuple[bool, str]:
    """The same of the gradients of a trained network, on the first pictures. `model` comes back unfused."""
    try:
        errors = check("trained network", unfuse(model), data.train[0][:64], [FUSED, LEAN])
    except CheckFailed as error:
        return False, str(error)
    return True, (
        f"gradients with the trained weights, the worst of any block: off by {errors[FUSED.name]:.1e}, unfused by "
        f"{errors[EAGER.name]:.1e}: must be within {GRADIENT_BOUND[torch.float32]:.0e}, or {SLACK:g} times unfused"
    )


def save_picture(file: str, runs: Sequence[Run], title: str) -> None:
    """The curves of all runs on one logarithmic axis."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the picture needs matplotlib, which is not installed: pip install '.[bench]'")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for run in runs:
        points = curve(run).exp()
        steps = len(run.losses)
        width = 4 if run is runs[0] else 1.5  # the lean run lies on it
        label = f"{run.name}: {run.accuracy:.2%} of the test right"
        axes.plot(range(steps - len(points) + 1, steps + 1), points, label=label, linewidth=width)
    axes.set(xlabel="step", ylabel=f"loss (mean of {SMOOTHED} steps)", yscale="log", title=title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def start_processes() -> int:
    """Joins the process group if torchrun started this process; returns its rank."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0
    dist.init_process_group("gloo")
    return dist.get_rank()


def train_demo_command(arguments: argparse.Namespace, progress: Any) -> int:
    """The command: exit code 0 if the fused network learns as the unfused one does, else 1."""
    threads = torch.get_num_threads()  # torchrun sets OMP_NUM_THREADS to 1
    rank = start_processes()
    data = load_digits(arguments.images)
    if len(data.train[0]) < arguments.batch:
        raise InputError(f"--batch {arguments.batch} is more than the {len(data.train[0])} images to learn from")
    shown = progress if rank == 0 else lambda *_: None
    ways = [Way("fused", threads, memory="fast"), Way("fused lean", threads, memory="lean")]
    if dist.is_initialized():
        ways.append(Way("unfused", threads))
    else:
        more = max(2, threads)
        ways += [
            Way("unfused, 1 thread", 1),
            Way(f"unfused, {more} threads", more),
            Way(f"unfused, {more} threads, contiguous", more, channels_last=False),
        ]
    try:
        results = [
            train(way, arguments.width, data, epochs=arguments.epochs, batch=arguments.batch, progress=shown)
            for way in ways
        ]
    finally:
        progress.clear()
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank > 0:
        return 0
    runs = [run for run, _ in results]
    fused, lean, *unfused = runs
    same = fused.losses == lean.losses and fused.accuracy == lean.accuracy
    verdicts = [(same, "both memory modes: must be the same, bit by bit"), *judge(fused, unfused)]
    if processes == 1:
        verdicts.append(judge_gradients(results[0][1], data))
    return report(arguments, runs, verdicts, processes)


def report(
    arguments: argparse.Namespace, runs: Sequence[Run], verdicts: Sequence[tuple[bool, str]], processes: int
) -> int:
    """Prints the table and the verdicts, draws the picture, writes the JSON; the exit code."""
    images = len(runs[0].losses) // arguments.epochs * arguments.batch
    title = f"MobileNetV2 x{arguments.width:g} on {images} digits of 32x32, batch {arguments.batch}"
    if processes > 1:
        title += f", {processes} processes"
    print(title)
    rows = [["", "first loss", "last epoch", "test accuracy", "seconds", "ran on"]]
    for run in runs:
        epoch = run.losses[-(len(run.losses) // arguments.epochs) :]
        figures = [
            f"{run.losses[0]:.4f}",
            f"{sum(epoch) / len(epoch):.4f}",
            f"{run.accuracy:.2%}",
            f"{run.seconds:.1f}",
        ]
        rows.append([run.name, *figures, run.backends])
    print(columns(rows))
    for holds, text in verdicts:
        print(f"{'ok ' if holds else 'BAD'} {text}")
    save_picture(arguments.picture, runs, title)
    print(f"picture: {arguments.picture}")
    if arguments.json:
        content = {
            "machine": machine(torch.get_num_threads()),
            "title": title,
            "verdicts": [{"holds": holds, "text": text} for holds, text in verdicts],
            "runs": [asdict(run) for run in runs],
        }
        write_json(arguments.json, "train-demo", content)
    return 0 if all(holds for holds, _ in verdicts) else 1
