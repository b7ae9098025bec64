"""Timing on a CUDA device: events, graphs, memory, the card's own ceilings, and the contestants that exist only there.

Everything that needs the device itself is a method of `Cuda`, so that a test can drive the benchmarks with a stand-in.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .peers import Peer, PeerUnavailable, Run, fold_batch_norm

Result = TypeVar("Result")


class Cuda:
    """The current CUDA device."""

    name = "cuda"
    copy_elements = 1 << 29  # of a 16-bit tensor: 1 GiB, far more than any L2 cache
    matmul_size = 8192

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        torch.cuda.synchronize()

    def elapsed(self, call: Callable[[], object], calls: int) -> float:
        """Milliseconds a call, by events around `calls` calls in a row."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """`run` as a CUDA graph: what replays it, and the result that every replay writes anew.

        Run twice before, on another stream, as torch asks for: whatever is made at the first call (compiled kernels,
        cuDNN's choice, folded weights) must not be made inside the graph.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        return graph.replay, result

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most that one call of `run` holds at a time, beyond what is held before it; for a graph, uncaptured."""
        run = run.run if isinstance(run, Replay) else run
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def l2_bytes(self) -> int:
        """Size of the L2 cache."""
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def release(self) -> None:
        """Give cached memory back."""
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """The card as a record keeps it."""
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "gpu": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30),
            "l2_mib": p.L2_cache_size / 2**20,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def milliseconds(self, call: Callable[[], object], samples: int = 9, least: float = 4.0) -> float:
        """Median milliseconds of `call` over `samples` samples, each of which lasts `least` milliseconds or more."""
        for _ in range(3):
            call()
        calls = max(1, round(least / max(1e-4, self.elapsed(call, 2))))
        return statistics.median(self.elapsed(call, calls) for _ in range(samples))

    def copy_rate(self) -> float:
        """GB/s of a copy within the device, bytes read and bytes written."""
        a = torch.randn(self.copy_elements, device=self.name, dtype=torch.float16)
        b = torch.empty_like(a)
        return 2 * a.nbytes / self.milliseconds(lambda: b.copy_(a)) / 1e6

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """TFLOP/s of a large matrix product on random data."""
        m = torch.randn(self.matmul_size, self.matmul_size, device=self.name, dtype=dtype)
        return 2 * self.matmul_size**3 / self.milliseconds(lambda: m @ m) / 1e9


# ---- torch's two depthwise kernels ----------------------------------------------------------------------------------

HAS_DEPTHWISE_SWITCH = hasattr(torch._C, "_set_cudnn_depthwise_kernel")


@contextlib.contextmanager
def depthwise(kernel: str) -> Iterator[None]:
    """torch's switch between cuDNN's ("cudnn") and its own ("native") depthwise kernel, where this torch has it."""
    if not HAS_DEPTHWISE_SWITCH:
        yield
        return
    before = torch._C._get_cudnn_depthwise_kernel()
    torch._C._set_cudnn_depthwise_kernel(kernel)
    try:
        yield
    finally:
        torch._C._set_cudnn_depthwise_kernel(before)


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """`torch.backends.cudnn.flags(enabled=False)` raises where TF32 was switched for convolutions alone."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


class NativeDepthwise(nn.Module):
    """A depthwise convolution by torch's own kernel, in every torch: by the switch, or with cuDNN off around it."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        with depthwise("native") if HAS_DEPTHWISE_SWITCH else without_cudnn():
            return self.conv(x)


def with_native_depthwise(model: nn.Module) -> nn.Module:
    """A copy of `model` whose depthwise convolutions do not use cuDNN."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child.groups > 1 and not isinstance(parent, NativeDepthwise):
                setattr(parent, name, NativeDepthwise(child))
    return model


# ---- Contestants ----------------------------------------------------------------------------------------------------


def _channels_last(module: Any) -> Any:
    return module.to(memory_format=torch.channels_last)


class FoldedNative(Peer):
    """BatchNorm folded, channels_last, depthwise convolutions by torch's own kernel (cuDNN's is `Folded`)."""

    name = "folded, native depthwise"

    def prepare(self, model: nn.Module, example: Tensor, threads: int) -> Run:
        native, x = _channels_last(with_native_depthwise(fold_batch_norm(model, example))), _channels_last(example)
        return lambda: native(x)


class MaxAutotune(Peer):
    """torch.compile of the folded channels_last model, all its choices timed on this card. Without its own graphs."""

    name = "torch.compile max-autotune"

    def prepare(self, model: nn.Module, example: Tensor, threads: int) -> Run:
        x = _channels_last(example)
        try:
            run = max_autotune(_channels_last(fold_batch_norm(model, example)))
            with torch.no_grad():
                run(x)
        except Exception as error:  # no compiler, no memory, a graph that inductor cannot take, ...
            raise PeerUnavailable(f"torch.compile failed: {type(error).__name__}: {first_line(error)}") from error
        return lambda: run(x)


def max_autotune(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """torch.compile at its best; CUDA graphs are left to whoever times it, as for every other contestant."""
    torch._dynamo.reset()
    return torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)


class Graphed(Peer):
    """Another contestant, captured in a CUDA graph."""

    def __init__(self, peer: Peer, device: Cuda):
        self.peer, self.device = peer, device
        self.name, self.ours = peer.name, peer.ours

    def missing(self) -> str | None:
        return self.peer.missing()

    def version(self) -> str:
        return self.peer.version()

    def prepare(self, model: nn.Module, example: Tensor, threads: int) -> Run:
        run = self.peer.prepare(model, example, threads)
        try:
            with torch.no_grad():
                replay, y = self.device.capture(run)
        except Exception as error:
            if self.ours:  # that is a fault to be seen, not a contestant that is missing
                raise
            raise PeerUnavailable(f"no CUDA graph: {type(error).__name__}: {first_line(error)}") from error

        return Replay(run, replay, y)


@dataclass(frozen=True)
class Replay:
    """A captured run. What it needs while it runs was allocated with the graph: `run` shows how much that is."""

    run: Run
    replay: Callable[[], None]
    y: Tensor

    def __call__(self) -> Tensor:
        self.replay()
        return self.y


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
