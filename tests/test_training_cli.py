"""`mbv2-kernels train-demo` and `bench --train`, at their smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mbv2_kernels import FusedInvertedResidual
from mbv2_kernels._bench.timing import CheckFailed
from mbv2_kernels._bench.training import EAGER, FUSED, LEAN, check, compare_training, saved_bytes
from mbv2_kernels.cli import main


def test_train_demo_draws_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="train-demo learns scikit-learn's digits")
    pytest.importorskip("matplotlib", reason="train-demo draws with matplotlib")
    picture, record = tmp_path / "losses.png", tmp_path / "losses.json"
    options = ["--epochs", "1", "--images", "32", "--batch", "16", "--width", "0.1"]
    assert main(["train-demo", *options, "--picture", str(picture), "--json", str(record)]) in (0, 1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    runs = json.loads(record.read_text())["runs"]
    assert [run["name"] for run in runs] == ["fused", "unfused, 1 thread(s)", "unfused, 2 thread(s)"]
    assert [run["backends"] for run in runs] == ["cpu", "original modules", "original modules"]
    first = [run["losses"][0] for run in runs]
    assert len(runs[0]["losses"]) == 2 and max(first) - min(first) < 1e-3  # the same weights and batch
    assert "fused to the nearest unfused run" in capsys.readouterr().out


def test_bench_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "bench.json"
    options = ["--train", "--only", "network", "--no-compile", "--size", "32", "--seconds", "0.01", "--batch", "2"]
    assert main(["bench", *options, "--json", str(record)]) == 0
    network = json.loads(record.read_text())["network"]
    assert network["timings"].keys() == {"fused", "fused lean", "eager", "channels_last"}
    saved = network["saved"]
    assert saved["fused lean"] < saved["fused"] < saved["eager"] == saved["channels_last"]
    assert "kept MiB" in capsys.readouterr().out


def test_saved_bytes_counts_each_storage_once() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert saved_bytes(nn.Sequential(nn.ReLU6(), nn.ReLU6()), x) == 2 * 3 * 4 * 4 * 4  # x is not counted
    block = FusedInvertedResidual(8, 8, expand_ratio=4)
    image = torch.randn(2, 8, 20, 20)
    vectors = 8 * (3 * (32 + 32 + 8) + 8 + 8 + 8 * 8)
    assert saved_bytes(block, image) == 4 * 2 * 400 * (32 + 8) + vectors


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(FusedInvertedResidual(8, 8))
    x = torch.randn(2, 8, 9, 9)
    errors = check("block", model, x, [FUSED, LEAN])
    assert errors[FUSED.name] == errors[LEAN.name] < 1e-5 and errors[EAGER.name] < 1e-5
    monkeypatch.setattr("mbv2_kernels._bench.training.gradient_error", lambda got, expected: 0.1)
    with pytest.raises(CheckFailed, match="gradients of fused are off by"):
        monkeypatch.setattr("mbv2_kernels._bench.training.SLACK", 0.5)
        compare_training("block", model, x, [FUSED], threads=1, seconds=0.01)
