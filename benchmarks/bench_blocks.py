"""The 17 blocks of MobileNetV2 at 224x224, batch 1, one thread: fused and unfused, one group a block."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor, nn

from mbv2_kernels._bench.suite import blocks
from peers import block_peers
from timed import network, timed

PATHS = [f"features.{i}" for i in range(1, 18)]


@functools.cache
def _blocks() -> dict[str, tuple[nn.Module, Tensor]]:
    return {path: (block, x) for path, block, x in blocks(*network())}


@pytest.mark.parametrize("peer", block_peers(), ids=lambda peer: peer.name)
@pytest.mark.parametrize("path", PATHS)
def bench_block(benchmark: Any, path: str, peer: Any) -> None:
    block, x = _blocks()[path]
    shape = "x".join(map(str, x.shape))
    benchmark.group = f"{path} {shape}"
    timed(benchmark, path, block, x, peer, threads=1, network=False)
