"""What the pytest-benchmark files share: the network they measure, and "check first, then time"."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mbv2_kernels._bench.inputs import load_model, random_pictures, randomise_batch_norm
from mbv2_kernels._bench.machine import fma_peak
from mbv2_kernels._bench.peers import Peer
from mbv2_kernels._bench.timing import bytes_moved, prepare
from mbv2_kernels.models import count

measured_peak = functools.cache(fma_peak)


@functools.cache
def network() -> tuple[nn.Module, Tensor]:
    """The built-in MobileNetV2 with BatchNorms as if trained, and one random picture."""
    model, size = load_model("builtin:mobilenet_v2")
    randomise_batch_norm(model, size)
    return model, random_pictures(1, size)


def timed(benchmark: Any, label: str, model: nn.Module, x: Tensor, peer: Peer, *, threads: int, network: bool) -> None:
    """Time `peer` with the fixture `benchmark`, once its output is checked; skip with the reason if it cannot run."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            runs, errors, unavailable = prepare(label, model, x, [peer], threads, network=network)
            if unavailable:
                pytest.skip(f"{peer.name}: {unavailable[peer.name]}")
            y = benchmark(runs[peer.name])
        flop = 2 * count(model, x.shape).multiply_adds
        benchmark.extra_info.update(
            version=peer.version(),
            threads=threads,
            relative_error=errors[peer.name],
            flop=flop,
            bytes=bytes_moved(model, x, y),
        )
        if benchmark.stats is not None:  # None under --benchmark-disable
            gflops = 1e-9 * flop / benchmark.stats.stats.median
            peak = measured_peak() * threads
            benchmark.extra_info.update(gflops=gflops, fma_peak_gflops=peak, fraction_of_fma_peak=gflops / peak)
    finally:
        torch.set_num_threads(before)
