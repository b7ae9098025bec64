"""benchmarks/targets.py: what it calls held, and that a part of it runs and is written down."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

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


def test_a_part_and_its_record(targets: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "targets.json"
    assert targets.main(["--quick", "--only", "first-call", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["schema"] == "mbv2_kernels.targets" and content["quick"]
    (target,) = content["targets"]
    assert target["name"].startswith("first call") and target["value"] > 0
    assert target["verdict"] in capsys.readouterr().out
    assert {"fused", "ONNX Runtime", "OpenVINO"} <= set(content["peers"])


def test_an_unknown_part_is_an_error(targets: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main(["--only", "everything"]) == 2
    assert "--only: expected some of networks, blocks" in capsys.readouterr().err
