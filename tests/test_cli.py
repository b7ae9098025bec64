"""The command line: what it prints, what it writes, how it fails; and `status()` behind `info`."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mbv2_kernels as mbv2
from mbv2_kernels import _C, cli, models
from mbv2_kernels._bench import inputs, peers, timing, verify
from mbv2_kernels.backends import tier_of
from mbv2_kernels.status import cpu_model

# The smallest network and picture that still run every code path in a second.
SMALL = ["--model", "builtin:mobilenet_v2", "--size", "32"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks gain nothing from a second thread, and on a busy machine lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments: str) -> int:
    """The exit code of the command line, argparse's own exits included."""
    try:
        return cli.main(arguments)
    except SystemExit as exit:
        assert isinstance(exit.code, int)
        return exit.code


def one_line_of_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err, captured.err
    return captured.err


# info and status


def test_status_accounts_for_every_backend_and_tier() -> None:
    status = mbv2.status()
    assert [backend.name for backend in status.backends] == ["cpu", "triton", "reference"]
    cpu, triton, reference = status.backends
    assert cpu.available and reference.available
    assert [tier.name for tier in cpu.tiers] == [tier["name"] for tier in _C.all_tiers()]
    assert {tier.name for tier in cpu.tiers if tier.active} == {_C.active_tier(), _C.active_bf16_tier()}
    assert all(tier.reason for tier in cpu.tiers if not tier.runnable)
    assert triton.available == (torch.cuda.is_available() and importlib.util.find_spec("triton") is not None)
    assert triton.available or triton.reason
    assert status.threads == torch.get_num_threads()
    assert status.versions["torch"] == torch.__version__
    text = str(status)
    for name in ("cpu", "triton", "reference", *(tier.name for tier in cpu.tiers)):
        assert name in text


def test_status_and_import_do_not_import_triton(tmp_path: Path) -> None:
    code = "import sys, mbv2_kernels as m; m.status(); print('triton' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert child.stdout.strip() == "False"


def test_status_says_that_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    triton = mbv2.status().backends[1]
    assert not triton.available and "Triton is not installed" in triton.reason


def test_status_names_the_cap() -> None:
    before = _C.max_isa()
    try:
        _C.set_max_isa("portable")
        cpu = mbv2.status().backends[0]
        assert "held to portable" in cpu.reason
        assert [tier.name for tier in cpu.tiers if tier.active] == ["portable"]
    finally:
        _C.set_max_isa(before)


def test_status_says_what_runs_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    def row() -> tuple[bool, bool, str]:
        (found,) = (tier for tier in mbv2.status().backends[0].tiers if tier.name == name)
        return found.runnable, found.active, found.reason

    tier, before = _C.bf16_tier(), _C.max_isa()
    name = tier["name"]
    try:
        for cap in (None, name):
            _C.set_max_isa(cap)
            here = tier["runnable"]
            assert row() == (here, here, "for bfloat16 inference" if here else f"tier {name}: {tier['reason']}")
        _C.set_max_isa("portable")
        lacking = {**tier, "runnable": False, "reason": "the CPU or the operating system lacks amx-bf16"}
        for state, reason in (
            ({**tier, "runnable": True, "reason": ""}, "the tiers are held to portable at most (MBV2_MAX_ISA)"),
            (lacking, lacking["reason"]),
        ):
            monkeypatch.setattr(_C, "bf16_tier", lambda state=state: state)
            assert row() == (False, False, f"tier {name}: {reason}")
    finally:
        _C.set_max_isa(before)


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "info.json"
    assert run("info", "--json", str(file)) == 0
    out = capsys.readouterr().out
    assert cpu_model() in out and _C.active_tier() in out and "reference" in out
    content = json.loads(file.read_text())
    assert (content["schema"], content["schema_version"]) == ("mbv2_kernels.info", 1)
    assert content["machine"]["isa"] == _C.active_tier()
    assert content["machine"]["fma_peak_gflops_per_thread"] > 0
    assert set(content["fma_peak_gflops"]) == {tier["name"] for tier in _C.all_tiers() if tier["runnable"]}
    assert [backend["name"] for backend in content["status"]["backends"]] == ["cpu", "triton", "reference"]


# verify


def test_verify_on_random_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "verify.json"
    code = run("verify", *SMALL, "--batch", "2", "--json", str(file))
    out = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert code == (0 if content["ok"] else 1)
    assert [block["path"] for block in content["blocks"]] == [f"features.{i}" for i in range(19)]
    for block in content["blocks"]:
        assert 0 < block["error"] < 2e-6 and block["path"] in out
        assert block["ok"] == (block["error"] <= block["limit"])
        assert (block["backend"], block["tier"]) == ("cpu", _C.active_tier())
    assert content["network"]["images"] == 2 and content["network"]["top5"] == 1.0
    assert content["input_shape"] == [2, 3, 32, 32]
    assert "weights are random" in out and "random pictures" in out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_verify_in_half_precision_is_within_bounds(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", *SMALL, "--batch", "1", "--dtype", dtype) == 0
    out = capsys.readouterr().out
    assert "all errors within bounds" in out
    assert out.count(f"cpu/{tier_of(getattr(torch, dtype))} ") == 19


def wrong_fuse(model: nn.Module, **_: Any) -> nn.Module:
    """A fuse whose blocks are off by a ten thousandth."""
    fused = mbv2.patch.fuse(model)
    with torch.no_grad():
        model.features[3].conv[-1].weight.mul_(1.0001)
    return fused


def test_verify_fails_when_a_block_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mbv2, "fuse", wrong_fuse)
    file = tmp_path / "verify.json"
    assert run("verify", *SMALL, "--batch", "1", "--json", str(file)) == 1
    out = capsys.readouterr().out
    assert "OUT OF BOUNDS" in out
    content = json.loads(file.read_text())
    assert not content["ok"]
    block = content["blocks"][3]
    assert block["path"] == "features.3" and not block["ok"] and block["error"] > 1e-5


def test_bench_reports_no_speed_when_a_block_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # copies of one block have no features: the network's check must catch it
    monkeypatch.setattr(mbv2, "fuse", wrong_fuse)
    assert run("bench", *SMALL, "--only", "network", "--no-compile", "--seconds", "0.01") == 1
    captured = capsys.readouterr()
    assert "fused is off by" in captured.err and "no speed is reported" in captured.err
    assert "GFLOP/s   of peak" not in captured.out and "median" not in captured.out


def test_limits_follow_the_bound_and_the_unfused_error() -> None:
    limit = verify.error_limit
    assert limit(torch.float32, 3e-7, 9) == 6e-7
    assert limit(torch.float32, 1e-7, 100) == 10 * 2**-24
    assert limit(torch.float32, 1.5e-6, 9) == limit(torch.float32, 0.0, 10**6) == 2e-6
    assert limit(torch.float32, 1.5e-6, 9, network=True) == 3e-6
    assert limit(torch.float32, 0.0, 0) == torch.finfo(torch.float32).eps / 2
    assert limit(torch.bfloat16, 5e-3, 9) == 8e-3
    assert limit(torch.bfloat16, 8e-3, 9) == pytest.approx(1.2e-2)
    assert limit(torch.bfloat16, 8e-3, 9, network=True) == 1.6e-2
    assert limit(torch.float16, 8e-3, 9) == 1e-3
    assert limit(torch.float16, 2e-4, 9) == pytest.approx(torch.finfo(torch.float16).eps / 2)
    assert verify.summands(models.mobilenet_v2().features[3]) == 24 + 9 + 144


def deep_block() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A block with the longest sums of MobileNetV2, its input as in the network, and its output in float64."""
    model = models.mobilenet_v2().eval()
    inputs.randomise_batch_norm(model, 64)
    x = inputs.block_inputs(model, ["features.15"], inputs.random_pictures(4, 64))["features.15"]
    block = model.features[15]
    with torch.no_grad():
        return block, x, copy.deepcopy(block).double()(x.double())


def test_sums_in_plain_order_are_within_the_limit() -> None:
    """Whatever order a machine's oneDNN adds in, a fused block that sums in the simplest one must not fail."""
    block, x, reference = deep_block()
    tensors = mbv2.fuse(copy.deepcopy(block)).forward.tensors().folded((1e-5,) * 3)
    expand, shift, depthwise, depthwise_shift, project, project_shift = tensors

    def in_order(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = bias.view(1, -1, 1, 1).expand(x.shape[0], -1, *x.shape[2:]).clone()
        for channel in range(x.shape[1]):
            y.addcmul_(weight[None, :, channel], x[:, channel : channel + 1])
        return y

    with torch.no_grad():
        hidden = in_order(x, expand, shift).clamp(0, 6)
        hidden = nn.functional.conv2d(hidden, depthwise, depthwise_shift, padding=1, groups=960).clamp(0, 6)
        y = x + in_order(hidden, project, project_shift)
    limit = verify.error_limit(torch.float32, 0.0, verify.summands(block))
    assert limit / 10 < verify.relative_error(y, reference) < limit / 1.5


@pytest.mark.parametrize(
    "mistake",
    [
        lambda conv: conv[1][0].weight[7, 0, 2, 1].mul_(1.01),  # one tap of one channel out of 960
        lambda conv: conv[1][0].weight[7].copy_(conv[1][0].weight[7].flip(2)),
        lambda conv: conv[0][0].weight[5, 3].mul_(1.05),
        lambda conv: conv[2].weight[:, 959].zero_(),  # the last hidden channel left out
        lambda conv: conv[3].bias[100].add_(1e-2),
        lambda conv: conv[0][1].running_var[3].mul_(1.05),
    ],
)
def test_one_wrong_weight_is_beyond_the_limit(mistake: Callable[[nn.Module], object]) -> None:
    block, x, reference = deep_block()
    with torch.no_grad():
        unfused = verify.relative_error(block(x), reference)
        mistake(block.conv)
        error = verify.relative_error(mbv2.fuse(block)(x), reference)
    assert error > 2 * verify.error_limit(torch.float32, unfused, verify.summands(block))


def test_relative_error() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert verify.relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert verify.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert verify.relative_error(torch.ones(3), reference) == float("inf")
    error = verify.relative_error(torch.tensor([float("nan"), 4.0]), reference)
    assert not error <= 1  # a NaN is never within a limit


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    image = pytest.importorskip("PIL.Image", reason="makes and reads pictures with Pillow")
    gradient = bytes(value for y in range(60) for x in range(90) for value in (x * 2, y * 4, (x * y) % 256))
    picture = image.frombytes("RGB", (90, 60), gradient)
    files = {name: tmp_path / name for name in ("rgb.png", "grey.jpg", "palette.gif", "half.png", "text.png")}
    picture.save(files["rgb.png"])
    picture.convert("L").save(files["grey.jpg"])
    picture.convert("P").save(files["palette.gif"])
    data = files["rgb.png"].read_bytes()
    files["half.png"].write_bytes(data[: len(data) // 2])
    files["text.png"].write_text("no picture")
    return files


def test_verify_on_pictures(pictures: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(pictures[name]) for name in ("rgb.png", "grey.jpg", "palette.gif")]
    assert run("verify", *SMALL, "--dtype", "bfloat16", "--image", *files) == 0
    out = capsys.readouterr().out
    assert "input: 3 picture(s)" in out and "input 3x3x32x32" in out


def test_pictures_are_cropped_to_the_centre_and_normalised(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="makes and reads pictures with Pillow")
    wide = image.new("RGB", (120, 40), (255, 0, 0))
    wide.paste((0, 0, 255), (40, 0, 80, 40))  # the middle third is blue
    wide.save(tmp_path / "wide.png")
    x = inputs.load_pictures([str(tmp_path / "wide.png")], 28)
    assert x.shape == (1, 3, 28, 28)
    expected = [
        (value - mean) / std
        for value, mean, std in zip((0, 0, 1), inputs.IMAGENET_MEAN, inputs.IMAGENET_STD, strict=True)
    ]
    assert torch.allclose(x.mean(dim=(0, 2, 3)), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [("half.png", "cannot read picture"), ("text.png", "is no picture"), ("absent.png", "No such file")],
)
def test_unreadable_pictures(
    pictures: dict[str, Path], name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pictures["rgb.png"].parent / name
    assert run("verify", *SMALL, "--image", str(pictures["rgb.png"]), str(file)) == 2
    error = one_line_of_error(capsys)
    assert message in error and name in error


def test_pictures_without_pillow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "PIL" else find(name, *a))
    assert run("verify", *SMALL, "--image", "x.png") == 2
    assert "needs Pillow, which is not installed (pip install pillow)" in one_line_of_error(capsys)


def test_weights_are_loaded_and_not_randomised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = models.mobilenet_v2()
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": trained.state_dict()}, file)
    arguments = cli._parser().parse_args(["verify", *SMALL, "--weights", str(file)])
    model, _, note = cli.build(arguments)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.state_dict().values(), strict=True)
    )
    assert note.startswith(f"weights from {file}")
    torch.save(models.mobilenet_v2(0.5).state_dict(), file)
    assert run("verify", *SMALL, "--weights", str(file)) == 2
    assert "do not fit the model" in one_line_of_error(capsys)


def test_randomised_batch_norms_keep_activations_alive() -> None:
    model = models.mobilenet_v2(0.35, num_classes=10).eval()
    inputs.randomise_batch_norm(model, 64)
    assert all(not module.training for module in model.modules())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.momentum == 0.1 for norm in norms)
    x = inputs.random_pictures(8, 64, seed=5)
    seen = inputs.block_inputs(model, [f"features.{i}" for i in range(1, 19)], x)
    for path, value in seen.items():
        assert 0.1 < value.std() < 20, path
    last = seen["features.1"]  # after a ReLU6: some of it is cut below, some above, most is neither
    assert 0.05 < (last == 0).float().mean() < 0.5 and 0 < (last == 6).float().mean() < 0.2


# bench


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    before = torch.get_num_threads()
    code = run(
        *("bench", "--model", "builtin:mobilenet_v1", "--size", "32", "--dtype", "bfloat16"),
        *("--no-compile", "--seconds", "0.01", "--threads", "1", "--json", str(file)),
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert torch.get_num_threads() == before
    assert "FMA peak" in captured.out and "best unfused / fused" in captured.out and "sum" in captured.out
    assert captured.err == ""  # no progress bar where there is no terminal
    content = json.loads(file.read_text())
    assert (content["schema"], content["schema_version"], content["threads"]) == ("mbv2_kernels.bench", 1, 1)
    assert len(content["blocks"]) == 14  # 13 blocks and the stem
    for entry in [*content["blocks"], content["network"]]:
        fused = entry["timings"]["fused"]
        assert fused["median"] >= fused["minimum"] > 0 and fused["ratio"] == 1
        assert fused["gflops"] == pytest.approx(2e-9 * entry["multiply_adds"] / fused["median"])
        assert entry["best_unfused"] in ("folded channels_last", "eager")
        assert entry["speedup"] == entry["timings"][entry["best_unfused"]]["ratio"]
        assert 0 < entry["errors"]["fused"] < 0.2
    assert sum(entry["multiply_adds"] for entry in content["blocks"]) < content["network"]["multiply_adds"]


def test_a_peer_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    model = models.mobilenet_v2(0.35, num_classes=10).eval()
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(peers.PeerUnavailable, match=r"^torch.compile failed: no C\+\+ compiler$"):
        peers.Compiled().prepare(model, x, 1)
    result = timing.compare("n", model, x, [peers.Eager(), peers.Compiled()], threads=1, seconds=0.01)
    assert result.unavailable == {"torch.compile": "torch.compile failed: no C++ compiler"}
    assert set(result.timings) == {"eager"}


def test_folding_removes_every_batch_norm_and_changes_nothing() -> None:
    for model in (models.mobilenet_v2(0.35, num_classes=10), models.mobilenet_v1(0.25, num_classes=10)):
        inputs.randomise_batch_norm(model.eval(), 32)
        model, x = model.double(), inputs.random_pictures(2, 32).double()
        folded = peers.fold_batch_norm(model, x)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        with torch.no_grad():
            assert verify.relative_error(folded(x), model(x)) < 1e-12


def test_folding_takes_timms_norms_with_an_activation_inside() -> None:
    timm = pytest.importorskip("timm", reason="folds timm's BatchNormAct2d")
    model = timm.create_model("mobilenetv2_035", num_classes=10).eval()
    inputs.randomise_batch_norm(model, 32)
    x = inputs.random_pictures(1, 32)
    folded = peers.fold_batch_norm(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        assert verify.relative_error(folded(x), model.double()(x.double())) < 1e-4


def test_interleaved_timing_takes_turns() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: (order.append(name), time.sleep(2e-3))) for name in "ab"}
    timings = timing.interleave(runs, seconds=0.05)
    assert set(timings) == {"a", "b"}
    for result in timings.values():
        assert result.samples >= timing.MIN_ROUNDS and 2e-3 <= result.minimum <= result.median < 1
    # after the calibration each round is (untimed, timed) of one, then of the other, the first one changing
    tail = "".join(order)[-8 * timings["a"].calls :]
    assert "aabb" in tail or "bbaa" in tail


# what cannot be done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["frob"], "invalid choice: 'frob'"),
        (["verify", "--batch", "0"], "expected a whole number of at least 1, got '0'"),
        (["bench", "--threads", "two"], "expected a whole number of at least 1, got 'two'"),
        (["bench", "--seconds", "nan"], "expected a number of seconds above 0, got 'nan'"),
        (["bench", "--frob"], "unrecognized arguments: --frob"),
        (["bench", "--graph"], "--graph is for CUDA graphs: it needs --device cuda"),
        (["verify", "--model", "mobilenet_v2"], "model must be builtin:NAME, torchvision:NAME or timm:NAME"),
        (["verify", "--model", "builtin:mobilenet"], "unknown model 'builtin:mobilenet'; near: builtin:mobilenet_v"),
        (["verify", "--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["verify", "--weights", "absent.pt"], "cannot read weights absent.pt"),
        (["info", "--json", "no/such/folder/x.json"], "there is no folder"),
        (["info", "--json", "."], "it is a folder"),
    ],
)
def test_bad_arguments_give_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = one_line_of_error(capsys)
    assert message in error and error.startswith("mbv2-kernels")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the error of a machine without a CUDA device")
def test_no_cuda_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "--device", "cuda") == 2
    assert "--device cuda:" in one_line_of_error(capsys)


@pytest.mark.parametrize("family", ["torchvision", "timm"])
def test_unknown_and_unsuitable_models(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(family, reason=f"asks {family} for models")
    assert run("verify", "--model", f"{family}:mobilenetv") == 2
    assert f"unknown model '{family}:mobilenetv'" in one_line_of_error(capsys)
    assert run("verify", "--model", f"{family}:resnet18", "--size", "32") == 2
    assert "nothing in this model can run fused" in one_line_of_error(capsys)


@pytest.mark.parametrize("family", ["torchvision", "timm"])
def test_a_model_of_a_package_that_is_not_installed(
    family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == family else find(name, *a))
    assert run("verify", "--model", f"{family}:x") == 2
    assert f"needs {family}, which is not installed (pip install {family})" in one_line_of_error(capsys)


def test_json_that_cannot_be_written_after_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    assert run("info", "--json", "/dev/full") == 2
    assert "cannot write /dev/full: No space left on device" in one_line_of_error(capsys)


def environment() -> dict[str, str]:
    """For a child that imports the same mbv2_kernels as this process."""
    found = str(Path(mbv2.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([found, os.environ.get("PYTHONPATH", "")])}


def test_the_module_runs_and_an_interrupt_leaves_no_traceback(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "mbv2_kernels", "bench", *SMALL, "--no-compile", "--seconds", "60"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # whoever runs the tests in the background has this signal ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout is not None
    assert "FMA peak" in child.stdout.readline()
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=120)
    assert child.returncode == 130
    assert error.strip().endswith("interrupted") and "Traceback" not in error
