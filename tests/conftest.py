"""What every test runs under: seeded, two threads, uninitialised memory full of NaN; and fixtures of several files."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded_and_two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="module")
def compiler() -> Iterator[concurrent.futures.Executor]:
    """Two processes that compile for GPUs that are not here: this one may have imported Triton as an interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            yield pool
            pool.shutdown(cancel_futures=True)  # what a selection of tests did not ask for
