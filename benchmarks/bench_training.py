"""A training step of MobileNetV2 (forward, loss, backward) at 224x224 on all cores: fused and every unfused way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mbv2_kernels._bench.inputs import random_pictures
from mbv2_kernels._bench.timing import activation_peak
from mbv2_kernels._bench.training import TRAINERS, Trainer, check, saved_bytes, step_of
from mbv2_kernels.status import cores
from timed import network

BATCH = 4


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.name)
def bench_training_step(benchmark: Any, trainer: Trainer) -> None:
    model, _ = network()
    x = random_pictures(BATCH, 224)
    threads = cores()
    benchmark.group = f"training step, MobileNetV2 {BATCH}x3x224x224, {threads} thread(s)"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        errors = check("network", model, x, [trainer])
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
            gradient_error=errors.get(trainer.name),
            saved_bytes=saved_bytes(candidate, image),
            peak_bytes=activation_peak(step),
        )
        benchmark(step)
    finally:
        torch.set_num_threads(before)
