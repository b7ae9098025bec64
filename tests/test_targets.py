"""benchmarks/targets.py: what it calls held, and that a part of it runs and is written down."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mbv2_kernels._bench.peers import Eager, Folded

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("targets")
    for name in ("targets", "compare", "peers"):
        sys.modules.pop(name, None)


def test_verdicts(targets: ModuleType) -> None:
    """A ratio must reach its target, a cost must not exceed it; what was not measured is neither held nor missed."""
    assert targets.Target("ratio", 1.5, 1.5).verdict == "held"
    assert targets.Target("ratio", 1.5, 1.49).verdict == "missed"
    assert targets.Target("cost", 1.3, 1.3, at_most=True).verdict == "held"
    assert targets.Target("cost", 1.3, 1.31, at_most=True).verdict == "missed"
    assert targets.Target("ratio", 1.5, None).verdict == "not measured"
    assert "<= 1.3" in targets.table_of([targets.Target("cost", 1.3, 1.31, at_most=True)]).splitlines()[1]


def test_16_bits_and_the_cost_of_a_call(
    targets: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Speed in 16 bits is told for the network and for the worst block, and for none whose result is off."""
    todo = targets.single_blocks()
    assert [path for path, *_ in todo] == [f"features.{i}" for i in range(1, 18)]
    monkeypatch.setattr(targets, "single_blocks", lambda: todo[14:16])
    request.getfixturevalue("short_network")  # whose calls are timed
    file = tmp_path / "targets.json"
    arguments = ["--quick", "--seconds", "0.01", "--only", "storage", "call", "--json", str(file)]
    assert targets.main(arguments) == 0
    content = json.loads(file.read_text())
    ratios = content["storage"]
    assert list(ratios) == ["network", "features.15", "features.16"]
    assert all(set(ratio) == set(targets.DTYPES) for ratio in ratios.values())
    values = [target["value"] for target in content["targets"]]
    for name in ("bfloat16", "float16"):
        assert values.pop(0) == ratios["network"][name]
        assert values.pop(0) == min(ratios[path][name] for path in ("features.15", "features.16"))
    assert values[0] < 1e5
    assert targets.main([*arguments, "--resume"]) == 0 and json.loads(file.read_text()) == content
    monkeypatch.setattr(targets, "error_limit", lambda *_, network: 1.0 if network else 1e-9)
    assert targets.main(arguments) == 1
    assert "features.15: fused is off by" in capsys.readouterr().err


@pytest.mark.usefixtures("short_network")
def test_a_part_and_its_record(targets: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "targets.json"
    assert targets.main(["--quick", "--only", "first-call", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["schema"] == "mbv2_kernels.targets" and content["quick"]
    (target,) = content["targets"]
    assert target["name"].startswith("first call") and target["value"] > 0
    assert target["verdict"] in capsys.readouterr().out
    assert {"fused", "ONNX Runtime", "OpenVINO"} <= set(content["peers"])


@pytest.mark.usefixtures("short_network")
def test_a_stopped_sweep_goes_on_where_it_was(
    targets: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every shape is written down as soon as it is measured, and no shape twice."""
    file = tmp_path / "targets.json"
    arguments = ["--quick", "--seconds", "0.01", "--only", "sweep", "--json", str(file), "--resume"]
    monkeypatch.setattr(targets, "QUICK_SWEEP", ((0.35, 32, 1), (0.35, 32, 2)))
    monkeypatch.setattr(targets, "OnnxRuntime", Eager)
    monkeypatch.setattr(targets, "OpenVino", Folded)
    compare, labels = targets.compare, []

    def stopping(label: str, *args: Any, **kw: Any) -> Any:
        labels.append(label)
        if len(labels) == 2:
            raise KeyboardInterrupt
        return compare(label, *args, **kw)

    monkeypatch.setattr(targets, "compare", stopping)
    assert targets.main(arguments) == 130
    content = json.loads(file.read_text())
    assert [label for label, *_ in content["sweep"]] == ["width 0.35, 32x32, batch 1"] and content["parts"] == []
    assert targets.main(arguments) == 0
    assert labels == ["width 0.35, 32x32, batch 1", *["width 0.35, 32x32, batch 2"] * 2]
    content = json.loads(file.read_text())
    ratios = [ratio for _, ratio, _ in content["sweep"]]
    (target,) = content["targets"]
    assert target["value"] == min(ratios) and len(content["comparisons"]) == 2 and content["parts"] == ["sweep"]
    assert targets.main(arguments) == 0 and len(labels) == 3  # nothing is left to measure
    assert f"{target['value']:.2f}" in capsys.readouterr().out
    file.write_text(json.dumps({**content, "quick": False}))
    assert targets.main(arguments) == 2
    assert "was measured without --quick" in capsys.readouterr().err


def test_resume_needs_a_file(targets: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main(["--resume"]) == 2
    assert "--resume: goes on with a file" in capsys.readouterr().err


def test_an_unknown_part_is_an_error(targets: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main(["--only", "everything"]) == 2
    assert "--only: expected some of networks, blocks" in capsys.readouterr().err
