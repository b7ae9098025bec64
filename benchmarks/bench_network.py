"""The whole MobileNetV2 at 224x224, batch 1, on one thread and on all cores: fused, and every peer."""

from __future__ import annotations

from typing import Any

import pytest

from mbv2_kernels.status import cores
from peers import network_peers
from timed import network, timed


@pytest.mark.parametrize("peer", network_peers(), ids=lambda peer: peer.name)
@pytest.mark.parametrize("threads", sorted({1, cores()}))
def bench_network(benchmark: Any, threads: int, peer: Any) -> None:
    model, x = network()
    benchmark.group = f"MobileNetV2 1x3x224x224, {threads} thread(s)"
    timed(benchmark, "network", model, x, peer, threads=threads, network=True)
