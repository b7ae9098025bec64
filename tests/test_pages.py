"""The memory that packed weights live in (csrc/core/pages.h): never shared, never lost, given back."""

from __future__ import annotations

import itertools
import random
import threading

import torch

from mbv2_kernels import _C

MEGABYTE = 1 << 20


def pack(out_channels: int, in_channels: int, value: float) -> torch.Tensor:
    return torch.ops.mbv2.pack_conv(torch.full((out_channels, in_channels, 1, 1), value), None)


def holds(packed: torch.Tensor, value: float) -> bool:
    """Whether the weights are still what they were packed as: the array has a header, zeros and copies of one value."""
    weights = packed[16:]
    return bool(((weights == 0) | (weights == value)).all() and (weights == value).any())


def ranges(arrays: list[torch.Tensor]) -> list[tuple[int, int]]:
    return sorted((a.data_ptr(), a.data_ptr() + a.numel() * 4) for a in arrays)


def test_arrays_never_overlap_whatever_the_order_of_release() -> None:
    """Free ranges are split and joined again: a mistake there would give two blocks the same weights."""
    draw = random.Random(0)
    before = _C.mapped_memory()[1]
    kept: list[tuple[float, torch.Tensor]] = []
    for value in range(1, 400):
        kept.append((float(value), pack(draw.choice([8, 40, 320]), draw.choice([1, 100, 960]), float(value))))
        while kept and draw.random() < 0.45:
            kept.pop(draw.randrange(len(kept)))
    assert len(kept) > 20
    placed = ranges([a for _, a in kept])
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(placed))
    assert all(begin % 64 == 0 for begin, _ in placed)
    assert all(holds(a, value) for value, a in kept)
    assert _C.mapped_memory()[1] - before >= sum(a.numel() * 4 for _, a in kept)
    kept.clear()
    assert _C.mapped_memory()[1] == before


def test_released_memory_is_used_again_and_regions_are_given_back() -> None:
    mapped = _C.mapped_memory()[0]
    arrays = [pack(512, 1024, 1.0) for _ in range(24)]  # 2 MB each
    assert _C.mapped_memory()[0] >= mapped + 32 * MEGABYTE
    full = _C.mapped_memory()[0]
    for index in (7, 3, 20):
        arrays[index] = torch.empty(0)
        arrays[index] = pack(512, 1024, 1.0)
    assert _C.mapped_memory()[0] == full
    arrays.clear()
    assert _C.mapped_memory()[0] <= mapped + 8 * MEGABYTE  # one empty region stays


def test_an_array_larger_than_a_region() -> None:
    mapped = _C.mapped_memory()[0]
    large = pack(2048, 2048, 3.0)
    assert large.numel() * 4 > 16 * MEGABYTE
    assert holds(large, 3.0)
    del large
    assert _C.mapped_memory()[0] <= mapped + 8 * MEGABYTE


def test_threads_pack_and_release_at_once() -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        kept: list[torch.Tensor] = []
        for _ in range(200):
            kept.append(pack(draw.choice([8, 64]), draw.choice([10, 300]), float(seed)))
            if draw.random() < 0.5:
                kept.pop(draw.randrange(len(kept)))
        if not all(holds(a, float(seed)) for a in kept):
            failures.append(f"thread {seed}: weights changed")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_view_keeps_the_memory() -> None:
    view = pack(64, 300, 2.0)[16:32]
    for _ in range(8):
        pack(64, 300, 5.0)
    assert (view == 2.0).all()
