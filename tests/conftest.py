"""What every test runs under: seeded, two threads, uninitialised memory full of NaN; and fixtures of several files."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import sys
from collections.abc import Iterator

import pytest

# OpenMP's idle threads spin for milliseconds before they sleep: with another process on a core, at the cost of the one
# thread that has work, and tests of many tiny calls took 30 times as long. It is read once, when torch is loaded.
# Not for `pytest --benchmark`, which loads this file too and times the threads that users have.
if "--benchmark" not in sys.argv:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch


@pytest.fixture(autouse=True)
def _seeded_and_two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_cap() -> Iterator[None]:
    """The tiers that run without MBV2_MAX_ISA; whatever cap a test sets is lifted after it."""
    from mbv2_kernels import _C

    cap = _C.max_isa()
    _C.set_max_isa(None)
    yield
    _C.set_max_isa(cap)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that is read before it is written shows up as NaN.

    Deterministic mode is torch's own way to poison `torch.empty` and its kin: it also reaches what the extension
    allocates below Python, and torch.compile knows it. `warn_only`, because nothing else of that mode is wanted.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def short_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """builtin:mobilenet_v2 has three blocks, one without expand, one with stride 2, one with a residual.

    For tests of what is done with a network. Fewer layers also amplify rounding less: with all 17 blocks down to one
    pixel, an error may be past a limit that is told by the luck of one unfused run.
    """
    from mbv2_kernels import models

    rows = ((1, 16, 1, 1), (6, 24, 2, 2))
    monkeypatch.setattr(models, "mobilenet_v2", functools.partial(models.mobilenet_v2, inverted_residual_setting=rows))


@pytest.fixture(scope="module")
def compiler() -> Iterator[concurrent.futures.Executor]:
    """Two processes that compile for GPUs that are not here: this one may have imported Triton as an interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            yield pool
            pool.shutdown(cancel_futures=True)  # what a selection of tests did not ask for
