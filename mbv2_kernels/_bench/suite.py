"""What is timed: each fused block of a network and the whole network; and how the figures are shown and stored."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import InputError, block_inputs
from .peers import Peer, Run
from .timing import Comparison, compare

SCHEMA_VERSION = 1

Progress = Callable[[str, int, int], None]


def no_progress(text: str, done: int, total: int) -> None:
    """Show nothing."""


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Unfused copies of all that `fuse` takes in `model` (which is not changed), by path.

    `InputError` with the reason if there is nothing.
    """
    from .. import fuse, summary
    from ..patch import fused_parts, unfused_part

    fused = fuse(copy.deepcopy(model))
    found = fused_parts(fused)
    if not found:
        rows = list(summary(fused))
        why = f"{rows[0].path}: {rows[0].reason}" if rows else "there is no MobileNet-like block in it"
        raise InputError(f"nothing in this model can run fused ({why})")
    return {path: copy.deepcopy(unfused_part(model, path, part)) for path, part in found.items()}


def blocks(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Sequential, Tensor]]:
    """(path, network of that one block, the input that it gets when `model` runs on `x`) for all that `fuse` takes."""
    found = parts(model)
    inputs = block_inputs(model, found, x)
    return [(path, nn.Sequential(found[path]), block_input) for path, block_input in inputs.items()]


def compare_blocks(
    model: nn.Module,
    x: Tensor,
    peers: Sequence[Peer],
    *,
    threads: int,
    seconds: float,
    progress: Progress = no_progress,
    memory: Callable[[Run], int] | None = None,
) -> list[Comparison]:
    """`compare` for each block, `seconds` each."""
    todo = blocks(model, x)
    results = []
    for done, (path, block, block_input) in enumerate(todo):
        progress(path, done, len(todo))
        results.append(compare(path, block, block_input, peers, threads=threads, seconds=seconds, memory=memory))
    return results


def table(comparisons: Sequence[Comparison], peers: Sequence[Peer], peak_gflops: float) -> str:
    """Milliseconds of every peer (medians), the best unfused one against ours, and ours against the FMA peak; where
    memory was measured, the most that ours and the best unfused one hold at a time.

    `peak_gflops` is of all threads together. Several comparisons get a line with their sum.
    """
    timed = [peer.name for peer in peers if any(peer.name in c.timings for c in comparisons)]
    unfused = [peer.name for peer in peers if not peer.ours]
    head = ["", "input", *(f"{name} ms" for name in timed), "best unfused / fused", "GFLOP/s", "of peak"]
    measured = any(c.peak_bytes for c in comparisons)
    head += ["fused peak MB", "best unfused"] if measured else []
    rows = []
    for c in comparisons:
        held = [c.peak_bytes.get("fused"), c.peak_bytes.get(c.fastest(unfused) or "")] if measured else []
        rows.append(
            [
                c.label,
                "x".join(map(str, c.input_shape)),
                *(f"{1e3 * c.timings[name].median:.3f}" if name in c.timings else "-" for name in timed),
                _ratio(c, unfused),
                f"{c.gflops('fused'):.0f}",
                f"{c.gflops('fused') / peak_gflops:.0%}",
                *(_megabytes(n) for n in held),
            ]
        )
    if len(comparisons) > 1:
        complete = [n for n in timed if all(n in c.timings for c in comparisons)]
        sums = {n: sum(c.timings[n].median for c in comparisons) for n in complete}
        best = min((sums[n] for n in unfused if n in sums), default=math.nan)
        rate = 2e-9 * sum(c.multiply_adds for c in comparisons) / sums["fused"]
        times = [f"{1e3 * sums[n]:.3f}" if n in sums else "-" for n in timed]
        rows.append(["sum", "", *times, f"{best / sums['fused']:.2f}", f"{rate:.0f}", f"{rate / peak_gflops:.0%}"])
        rows[-1] += [""] * (len(head) - len(rows[-1]))
    return columns([head, *rows])


def peer_table(comparison: Comparison, peers: Sequence[Peer], peak_gflops: float) -> str:
    """One comparison, one line a peer: median, minimum and middle 60 % in ms, time in units of ours, rate, error, and
    where it was measured the most memory held at a time."""
    rows = [["", "median ms", "min", "20 %", "80 %", "x fused", "GFLOP/s", "of peak", "error"]]
    rows[0] += ["peak MB"] if comparison.peak_bytes else []
    for name in (peer.name for peer in peers if peer.name in comparison.timings):
        timing, rate = comparison.timings[name], comparison.gflops(name)
        milliseconds = [f"{1e3 * t:.3f}" for t in (timing.median, timing.minimum, timing.p20, timing.p80)]
        ratio = f"{comparison.ratio(name):.2f}"
        rows.append([name, *milliseconds, ratio, f"{rate:.0f}", f"{rate / peak_gflops:.0%}"])
        rows[-1].append(f"{comparison.errors[name]:.1e}")
        rows[-1] += [_megabytes(comparison.peak_bytes[name])] if comparison.peak_bytes else []
    return columns(rows)


def _megabytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**20:.1f}"


def _ratio(comparison: Comparison, unfused: Sequence[str]) -> str:
    best = comparison.fastest(unfused)
    return "-" if best is None else f"{comparison.ratio(best):.2f}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns, the first one to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def missing_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """One line for each peer that could not run, with its reason."""
    reasons = {name: reason for c in comparisons for name, reason in c.unavailable.items()}
    return [f"not timed: {name}: {reason}" for name, reason in reasons.items()]


def record(comparison: Comparison, peers: Sequence[Peer], peak_gflops: float) -> dict[str, Any]:
    """A comparison as JSON holds it: seconds, ratios to ours, GFLOP/s, fraction of the peak."""
    entry = asdict(comparison)
    best = comparison.fastest([peer.name for peer in peers if not peer.ours])
    entry["best_unfused"] = best
    entry["speedup"] = None if best is None else comparison.ratio(best)
    for name, timing in entry["timings"].items():
        timing["ratio"] = comparison.ratio(name)
        timing["gflops"] = comparison.gflops(name)
        timing["fraction_of_peak"] = comparison.gflops(name) / peak_gflops
    return entry


def peer_versions(peers: Sequence[Peer]) -> dict[str, str]:
    """Name and version of each peer; the reason in place of the version where it cannot run."""
    return {peer.name: f"missing: {reason}" if (reason := peer.missing()) else peer.version() for peer in peers}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def check_json_path(file: str) -> None:
    """Raise `InputError` if `file` cannot be written: better before the work than after."""
    path = Path(file)
    if path.is_dir():
        raise InputError(f"cannot write {file}: it is a folder")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {file}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"cannot write {file}: permission denied")


def write_json(file: str, command: str, content: dict[str, Any]) -> None:
    """Write `content` with the schema's name and version; a regular file is replaced whole or not at all."""
    text = json.dumps(
        {"schema": f"mbv2_kernels.{command}", "schema_version": SCHEMA_VERSION, **_finite(content)}, indent=2
    )
    path = Path(file)
    try:
        if path.exists() and not path.is_file():  # a pipe or device
            path.write_text(text + "\n", encoding="utf-8")
            return
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as temporary:
            temporary.write(text + "\n")
        try:
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary.name, 0o666 & ~mask)
            os.replace(temporary.name, path)
        except BaseException:
            os.unlink(temporary.name)
            raise
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}") from error


def sample_network(model: nn.Module, x: Tensor, spec: str) -> None:
    """Raise `InputError` unless `model` takes `x` and gives [N, classes]."""
    try:
        with torch.no_grad():
            y = model(x)
    except Exception as error:  # whatever the model raises is what the user has to know
        text = " ".join(str(error).split())[:160]
        raise InputError(f"{spec} cannot run on input {'x'.join(map(str, x.shape))}: {text}") from error
    if not isinstance(y, Tensor) or y.dim() != 2:
        got = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"{spec} is no image classifier: it returns {got}, expected a tensor [images, classes]")
