"""A training step (forward, loss, backward) of MobileNetV2 at 224x224 and of each of its blocks, on all cores.

Fused in both memory modes, and every unfused way; with the bytes kept for backward and the most held at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mbv2_kernels._bench.inputs import random_pictures
from mbv2_kernels._bench.suite import blocks
from mbv2_kernels._bench.timing import activation_peak
from mbv2_kernels._bench.training import TRAINERS, Trainer, check, saved_bytes, step_of
from mbv2_kernels.status import cores
from timed import network

BATCH = 4
NETWORK = "MobileNetV2"
PATHS = [f"features.{i}" for i in range(1, 18)]


@functools.cache
def _subjects() -> dict[str, tuple[nn.Module, Tensor]]:
    model, x = network()[0], random_pictures(BATCH, 224)
    return {NETWORK: (model, x), **{path: (block, y.requires_grad_()) for path, block, y in blocks(model, x)}}


@functools.cache
def _errors(path: str) -> dict[str, float]:
    return check(path, *_subjects()[path], TRAINERS)


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.name)
@pytest.mark.parametrize("path", [NETWORK, *PATHS])
def bench_training_step(benchmark: Any, path: str, trainer: Trainer) -> None:
    model, x = _subjects()[path]
    threads = cores()
    benchmark.group = f"training step, {path} {'x'.join(map(str, x.shape))}, {threads} thread(s)"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        errors = _errors(path)
        candidate, image = trainer.prepare(model, x)
        step = step_of(candidate, image)
        try:
            step()
        except Exception as error:
            if not trainer.compiled:
                raise
            pytest.skip(f"torch.compile failed: {str(error).splitlines()[0]}")
        benchmark.extra_info.update(
            threads=threads,
            worst_gradient_error=errors.get(trainer.name),
            saved_bytes=saved_bytes(candidate, image),
            peak_bytes=activation_peak(step),
        )
        benchmark(step)
    finally:
        torch.set_num_threads(before)
