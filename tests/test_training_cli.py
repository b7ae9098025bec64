"""`mbv2-kernels train-demo` and `bench --train`, at their smallest."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import mbv2_kernels as mbv2
from mbv2_kernels import FusedInvertedResidual, training
from mbv2_kernels._bench import train_demo
from mbv2_kernels._bench.timing import CheckFailed
from mbv2_kernels._bench.train_demo import Run, distance, judge
from mbv2_kernels._bench.training import EAGER, FUSED, LEAN, check, compare_training, saved_bytes
from mbv2_kernels.cli import main


def test_train_demo_draws_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="train-demo learns scikit-learn's digits")
    pytest.importorskip("matplotlib", reason="train-demo draws with matplotlib")
    monkeypatch.setattr(train_demo, "BLOCKS", ((1, 16, 1, 1), (6, 24, 2, 2)))
    picture, record = tmp_path / "losses.png", tmp_path / "losses.json"
    options = ["--epochs", "1", "--images", "32", "--batch", "16", "--width", "0.1"]
    assert main(["train-demo", *options, "--picture", str(picture), "--json", str(record)]) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(record.read_text())
    assert [verdict["holds"] for verdict in found["verdicts"][:2]] == [True, False]  # two steps are no training
    runs = found["runs"]
    assert [run["name"] for run in runs[:3]] == ["fused", "fused lean", "unfused, 1 thread"] and len(runs) == 5
    assert [run["backends"] for run in runs] == ["cpu"] * 2 + ["original modules"] * 3
    first = [run["losses"][0] for run in runs]
    assert len(runs[0]["losses"]) == 2 and max(first) - min(first) < 1e-3  # the same weights and batch
    assert "BAD test accuracy" in capsys.readouterr().out


@pytest.mark.usefixtures("short_network")
def test_bench_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "bench.json"
    options = ["--train", "--only", "network", "--no-compile", "--size", "64", "--seconds", "0.01", "--batch", "2"]
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
    """Wrong once may be a value at the edge of a clamp; wrong for every input is wrong."""
    model = mbv2.unfuse(nn.Sequential(FusedInvertedResidual(8, 8)))
    x = torch.randn(2, 8, 9, 9)
    errors = check("network", model, x, [FUSED, LEAN])
    assert 0 < errors[FUSED.name] == errors[LEAN.name] < 1e-5 and 0 < errors[EAGER.name] < 1e-5
    factors = iter([1.01])
    right = training.gradient_like
    monkeypatch.setattr(training, "gradient_like", lambda leaf, g: right(leaf, g) * next(factors, 1))
    assert check("network", model, x, [FUSED])[FUSED.name] < 1e-5 and next(factors, None) is None
    monkeypatch.setattr(training, "gradient_like", lambda leaf, g: right(leaf, g) * 1.01)
    with pytest.raises(CheckFailed, match=r"network, block 0: gradients of fused off by 1\.0"):
        compare_training("network", model, x, [FUSED], threads=1, seconds=0.01)


def _run(losses: list[float], accuracy: float = 0.99) -> Run:
    return Run("", losses, accuracy, 1.0, "cpu")


def test_train_demo_judges_by_the_spread_of_unfused_runs() -> None:
    """Accuracy above 98 % and as unfused; a curve as far from the unfused ones as these are from each other."""
    fall = [2.0 * 0.9**step for step in range(40)]
    unfused = [_run([loss * factor for loss in fall]) for factor in (0.95, 1.0, 1.05)]
    assert distance(unfused[0], unfused[2]) == pytest.approx(math.log(1.05 / 0.95))

    def verdicts(factor: float, accuracy: float = 0.99) -> list[bool]:
        return [holds for holds, _ in judge(_run([loss * factor for loss in fall], accuracy), unfused)]

    assert verdicts(1.02) == [True, True]
    assert verdicts(1.15) == [True, False]
    assert verdicts(math.nan) == [True, False]
    assert verdicts(1.0, 0.98) == verdicts(1.0, 0.979) == [False, True]
    assert not judge(_run(fall, 0.985), [_run(fall, 0.999)])[0][0]
    assert len(judge(_run(fall), unfused[:1])) == 1  # one run has no spread
