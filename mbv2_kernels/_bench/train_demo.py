"""`mbv2-kernels train-demo`: the fused network learns real pictures as the unfused one does.

A CIFAR-style MobileNetV2 (first strides 1) on scikit-learn's 1797 handwritten digits, enlarged to 32 x 32: fused, and
unfused with several numbers of threads, all from the same weights and batches. Unfused runs differ among themselves,
because the order of torch's sums depends on the threads and training amplifies every rounding: what the fused run
differs by is judged by that spread.

Under torchrun the processes share every batch (DistributedDataParallel), and the fused blocks their statistics
(SyncBatchNorm).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import FusionRow, fuse, models, summary
from .inputs import InputError
from .machine import machine
from .suite import columns, write_json

SIZE = 32
#: Runs with the same rounding habits differ by chance too: one pair's distance says no more than its size.
SPREAD_SLACK = 2.0
SMOOTHED = 10  # steps that a point of the picture's curves is the mean of
#: The paper's table 2 with the first two strides 1 (the other is the stem's), as is usual for images of 32 x 32.
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


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
    model = models.mobilenet_v2(
        width_mult=width, num_classes=10, dropout=0.0, inverted_residual_setting=BLOCKS, stem_stride=1
    )
    return model.to(memory_format=torch.channels_last)


def train(
    name: str,
    width: float,
    data: Data,
    *,
    epochs: int,
    batch: int,
    threads: int,
    memory: str | None,
    progress: Callable[[str, int, int], None],
) -> Run:
    """`memory` "fast" or "lean": fused; None: unfused. SGD with momentum, the learning rate falling as a cosine."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model = network(width)
    wrapped = nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    if memory is not None:
        fuse(model, memory=memory)
        if processes > 1:
            # After DistributedDataParallel, which refuses SyncBatchNorm on CPU; and in the fused blocks alone, as
            # torch's own does not run there.
            for row in _blocks(model):
                nn.SyncBatchNorm.convert_sync_batchnorm(model.get_submodule(row.path))
            fuse(model, memory=memory)
    images, labels = data.train
    steps = epochs * (len(images) // batch)
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    start = time.perf_counter()
    try:
        for _ in range(epochs):
            for chosen in torch.randperm(len(images), generator=generator).split(batch)[: len(images) // batch]:
                chosen = chosen[rank::processes]
                loss = nn.functional.cross_entropy(wrapped(images[chosen]), labels[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                losses.append(_mean_over_processes(loss.detach()))
                progress(name, len(losses), steps)
        seconds = time.perf_counter() - start
        backends = ", ".join(sorted({row.backend or "-" for row in _blocks(model)})) if memory else "original modules"
        return Run(name, losses, accuracy(model, data), seconds, backends)
    finally:
        torch.set_num_threads(before)


def _blocks(model: nn.Module) -> list[FusionRow]:
    """The rows of fused blocks: stem and head train in their original modules."""
    return [row for row in summary(model) if row.fused and row.kind not in ("stem", "head")]


def accuracy(model: nn.Module, data: Data) -> float:
    images, labels = data.test
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def _mean_over_processes(loss: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return float(loss)


def distance(a: Run, b: Run) -> float:
    """Root mean square of the difference of two runs' losses."""
    return float((torch.tensor(a.losses) - torch.tensor(b.losses)).square().mean().sqrt())


def spread(fused: Run, unfused: Sequence[Run]) -> tuple[float, float]:
    """How far the fused run is from the nearest unfused one, and how far unfused runs are from each other at most."""
    pairs = [distance(a, b) for i, a in enumerate(unfused) for b in unfused[:i]]
    return min(distance(fused, run) for run in unfused), max(pairs)


def save_picture(file: str, runs: Sequence[Run], title: str) -> None:
    """The losses of all runs, smoothed and as they are, on one logarithmic axis."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the picture needs matplotlib, which is not installed: pip install '.[bench]'")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for run in runs:
        losses = torch.tensor(run.losses)
        width = min(SMOOTHED, len(losses))
        smooth = losses.unfold(0, width, 1).mean(1)
        label = f"{run.name}: {run.accuracy:.1%} right, {run.seconds:.0f} s"
        (line,) = axes.plot(range(width, len(losses) + 1), smooth, label=label)
        axes.plot(range(1, len(losses) + 1), losses, color=line.get_color(), alpha=0.15, linewidth=0.7)
    axes.set(xlabel="step", ylabel=f"loss (mean of {SMOOTHED} steps)", yscale="log", title=title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
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
    unfused_threads = (threads,) if dist.is_initialized() else sorted({1, max(2, threads)})
    plan = [("fused", threads, arguments.memory), *((f"unfused, {n} thread(s)", n, None) for n in unfused_threads)]
    try:
        runs = [
            train(
                name,
                arguments.width,
                data,
                epochs=arguments.epochs,
                batch=arguments.batch,
                threads=n,
                memory=memory,
                progress=shown,
            )
            for name, n, memory in plan
        ]
    finally:
        progress.clear()
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if dist.is_initialized():
            dist.destroy_process_group()
    return report(arguments, runs, processes) if rank == 0 else 0


def report(arguments: argparse.Namespace, runs: Sequence[Run], processes: int) -> int:
    """Prints the table, draws the picture, writes the JSON; the exit code."""
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
    fused, *unfused = runs
    agrees = True
    if len(unfused) > 1:
        ours, theirs = spread(fused, unfused)
        agrees = ours <= SPREAD_SLACK * theirs
        verdict = "within" if agrees else "OUTSIDE"
        print(
            f"losses (root mean square of the difference): fused to the nearest unfused run {ours:.4f}, unfused runs "
            f"to each other {theirs:.4f}: {verdict} {SPREAD_SLACK:g} times that spread"
        )
    save_picture(arguments.picture, runs, title)
    print(f"picture: {arguments.picture}")
    if arguments.json:
        content = {"machine": machine(torch.get_num_threads()), "title": title, "runs": [asdict(run) for run in runs]}
        write_json(arguments.json, "train-demo", content)
    return 0 if agrees else 1
