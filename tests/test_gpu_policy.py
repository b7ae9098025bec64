"""What holds for CUDA tensors before any kernel runs, on machines without a GPU: fake tensors stand for CUDA ones.

A Triton kernel that no GPU of an architecture has been checked on is never the default there, and the weights that a
CUDA graph reads stay where they are.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blocks import make_weights
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import mbv2_kernels as mbv2
from mbv2_kernels import backends, cli, fold
from mbv2_kernels._bench import cuda, peers, suite, timing
from mbv2_kernels.fold import NO_EPS, BlockTensors, FoldedWeights, Run
from mbv2_kernels.triton import configs

HOPPER = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One GPU of compute capability 9.0, on which nothing was checked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(configs, "CHECKED", {})
    monkeypatch.setattr(backends, "_warned", set())
    backends._capability.cache_clear()
    yield
    backends._capability.cache_clear()
    mbv2.set_backend("auto")


def on_gpu(*shape: int) -> Tensor:
    return FakeTensor(FakeTensorMode(), torch.empty(shape, device="meta", dtype=torch.float16), HOPPER)


def block() -> torch.nn.Module:
    return mbv2.fuse(mbv2.models.mobilenet_v2(0.35).eval()).features[3]


def test_an_unchecked_gpu_runs_the_original_modules(hopper: None, caplog: pytest.LogCaptureFixture) -> None:
    forward, x = block().forward, on_gpu(1, 8, 8, 8)
    with caplog.at_level(logging.WARNING, "mbv2_kernels"):
        reasons = [forward._refused_input(x, (), {}) for _ in range(3)]
        for reason in reasons:
            forward.note_refusal(reason)
    assert reasons[0] is not None and 'set_backend("triton")' in reasons[0] and "9.0" in reasons[0]
    assert [r.message for r in caplog.records] == [f"fused blocks run unfused: {reasons[0]}"]  # once, not once a block
    assert forward.last_reason == reasons[0]  # what summary shows


def test_the_row_of_summary_says_why(hopper: None) -> None:
    model = mbv2.fuse(mbv2.models.mobilenet_v2(0.35).eval())
    forward = model.features[3].forward
    forward.note_refusal(forward._refused_input(on_gpu(1, 8, 8, 8), (), {}))
    row = next(row for row in mbv2.summary(model) if row.path == "features.3")
    assert row.backend == "original modules" and 'set_backend("triton")' in row.reason


@pytest.mark.parametrize(
    ("kernel", "why"), [("gluon", "checked on H200"), ("triton", "the Gluon kernel has not been checked here")]
)
def test_the_row_of_summary_names_the_kernel(
    hopper: None, monkeypatch: pytest.MonkeyPatch, kernel: str, why: str
) -> None:
    """Which of the two Triton kernels ran, and why; the weights, the same for both, are kept once."""
    prepared = []
    triton = SimpleNamespace(
        prepare_weights=lambda dtype, *folded: prepared.append(dtype) or folded,
        run=lambda x, *arguments: (torch.zeros_like(x), kernel, why),
    )
    monkeypatch.setattr(backends, "_select_triton", lambda x, tensors: triton)
    model = mbv2.fuse(mbv2.models.mobilenet_v2(0.35).eval())
    mbv2.set_backend("triton")
    with torch.no_grad():
        for _ in range(2):
            model.features[3](torch.randn(1, 8, 8, 8))
    row = next(row for row in mbv2.summary(model) if row.path == "features.3")
    assert (row.fused, row.backend, row.tier, row.reason) == (True, "triton", kernel, why)
    assert prepared == [torch.float32]


def test_opting_in_and_checked_architectures(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, x = block().forward, on_gpu(1, 8, 8, 8)
    mbv2.set_backend("triton")
    assert forward._refused_input(x, (), {}) is None
    mbv2.set_backend("auto")
    assert forward._refused_input(x, (), {}) is not None
    monkeypatch.setattr(configs, "CHECKED", {90: "a card, versions, a date"})
    assert forward._refused_input(x, (), {}) is None


def test_the_functional_form_and_the_op_ask_too(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = SimpleNamespace(inverted_residual=lambda x, *args: "launched")
    monkeypatch.setattr(backends, "_triton_ops", lambda: (launched, ""))
    x, tensors = on_gpu(1, 8, 8, 8), BlockTensors.from_folded(FoldedWeights(*make_weights()))
    assert backends._select_triton(x, tensors) is None
    monkeypatch.setattr(backends.reference, "inverted_residual", lambda *args, **config: torch.zeros(1, 8, 8, 8))
    arguments = (*make_weights(), 1, 1, 1, "relu6", "none", False)
    assert isinstance(backends.inverted_residual_triton(x, *arguments), Tensor)
    mbv2.set_backend("triton")
    assert backends._select_triton(x, tensors) is launched
    assert backends.inverted_residual_triton(x, *arguments) == "launched"


def test_compiled_code_asks_while_it_is_traced(hopper: None, caplog: pytest.LogCaptureFixture) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def run(x: Tensor) -> Tensor:
        return x + 1 if backends.unchecked_gpu(HOPPER) is None else x - 1

    with caplog.at_level(logging.WARNING, "mbv2_kernels"):
        assert run(torch.zeros(1)).item() == -1
    assert len([r for r in caplog.records if r.name == "mbv2_kernels"]) == 1


def test_status_says_it(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    status = sys.modules["mbv2_kernels.status"]  # mbv2_kernels.status is the function
    monkeypatch.setattr(status, "cuda_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(status.importlib.util, "find_spec", lambda name, *args: SimpleNamespace())
    triton = mbv2.status().backends[1]
    assert triton.available and triton.reason.startswith('NVIDIA H100; not used by "auto": ')
    assert triton.reason.count("9.0") == 1
    monkeypatch.setattr(configs, "CHECKED", {90: "a card, versions, a date"})
    assert mbv2.status().backends[1].reason == "NVIDIA H100"


def test_the_command_line_opts_in_and_says_so(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """verify and bench check every result, so they are how to try a GPU on which nothing was checked."""
    note = cli._prepare_cuda(HOPPER, torch.float16)
    assert backends.get_backend() == "triton" and "not this GPU's default" in note and "TF32" not in note
    mbv2.set_backend("auto")
    monkeypatch.setattr(configs, "CHECKED", {90: "a card, versions, a date"})
    before = torch.backends.cudnn.allow_tf32
    try:
        assert cli._prepare_cuda(HOPPER, torch.float32) == "; TF32 off"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_native_depthwise_after_tf32_was_switched_for_convolutions_alone() -> None:
    """torch's own `cudnn.flags` raises then, in every contestant and every reference."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        with cuda.without_cudnn():
            assert not torch.backends.cudnn.enabled
        assert torch.backends.cudnn.enabled
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_contestants_on_a_gpu() -> None:
    arguments = cli._parser().parse_args(["bench", "--device", "cuda", "--graph"])
    blocks, network = cli._peers(arguments, HOPPER)
    assert [peer.name for peer in blocks] == ["fused", "folded channels_last", "folded, native depthwise", "eager"]
    assert [peer.name for peer in network[4:]] == ["torch.compile max-autotune"]
    assert all(isinstance(peer, cuda.Graphed) for peer in blocks + network)
    assert [peer.ours for peer in network] == [True, False, False, False, False]
    arguments = cli._parser().parse_args(["bench", "--no-compile"])
    assert [peer.name for peer in cli._peers(arguments, torch.device("cpu"))[1]] == [
        "fused", "folded channels_last", "eager",
    ]  # fmt: skip


class StandIn(cuda.Cuda):
    """A device whose graphs replay nothing."""

    def synchronize(self) -> None:
        pass

    def capture(self, run: Any) -> tuple[Any, Any]:
        return lambda: None, run()


def test_memory_of_a_bench_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column for the peak a call holds, of a graph's run before it was captured: the replay allocates nothing."""
    held, peaks = [0], [0]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.__setitem__(0, held[0]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks[0])

    class Peer(peers.Peer):
        def __init__(self, name: str, megabytes: int):
            self.name, self.ours, self.megabytes = name, name == "fused", megabytes

        def prepare(self, model: torch.nn.Module, example: Tensor, threads: int) -> Any:
            def run() -> Tensor:
                peaks[0] = max(peaks[0], held[0] + self.megabytes * 2**20)
                return model(example)

            return run

    device = StandIn()
    every = [cuda.Graphed(Peer("fused", 3), device), cuda.Graphed(Peer("eager", 24), device)]
    x = torch.randn(1, 3, 8, 8)
    model = torch.nn.Conv2d(3, 4, 1).eval()
    result = timing.compare("b", model, x, every, threads=1, seconds=0.01, memory=device.peak_bytes)
    assert result.peak_bytes == {"fused": 3 * 2**20, "eager": 24 * 2**20}
    head, *_, eager = (line.split() for line in suite.peer_table(result, every, 1.0).splitlines())
    assert head[-2:] == ["peak", "MB"] and eager[-1] == "24.0"
    assert suite.table([result], every, 1.0).splitlines()[1].split()[-2:] == ["3.0", "24.0"]
    assert suite.record(result, every, 1.0)["peak_bytes"] == result.peak_bytes
    without = timing.compare("b", model, x, every, threads=1, seconds=0.01)
    assert "MB" not in suite.peer_table(without, every, 1.0) + suite.table([without, without], every, 1.0)


# the weights that a CUDA graph reads


def test_weights_of_a_graph_outlive_a_change_but_not_the_model() -> None:
    memo, weights = fold.Memo(), make_weights()
    tensors, run = BlockTensors.from_folded(FoldedWeights(*weights)), Run("triton", None, torch.float16)

    def built(tensors: BlockTensors) -> object:
        return memo.get(tensors, NO_EPS, run, lambda folded: [w.clone() for w in folded])

    value = built(tensors)
    memo.keep(tensors, value)
    memo.keep(tensors, value)
    (kept,) = (values for _, values in memo._captured.values())
    assert len(kept) == 1 and kept[0] is value
    with torch.no_grad():
        weights[2].mul_(2)
    assert built(tensors) is not value and kept[0] is value
    memo.clear()
    assert kept[0] is value and len(memo._captured) == 1
    memo.keep(tensors, ["built during a capture: the graph's own"])
    assert len(kept) == 1
    del tensors, weights
    gc.collect()
    assert not memo._captured


def test_weights_for_a_gpu_are_built_outside_a_graphs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile's CUDA graphs send the calling thread's allocations to the graph's pool, and refuse what stays."""
    seen = []
    stream = SimpleNamespace(synchronize=lambda: seen.append("synchronized"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    def build(folded: FoldedWeights) -> int:
        assert not torch.is_grad_enabled()
        seen.append(threading.get_ident())
        return 7

    tensors = BlockTensors.from_folded(FoldedWeights(*make_weights()))
    assert fold._build_outside_graphs(tensors, NO_EPS, build) == 7
    assert len(seen) == 2 and seen[0] != threading.get_ident() and seen[1] == "synchronized"
