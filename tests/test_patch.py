"""What fuse keeps, what unfuse gives back, when the original modules run, and what summary says about it."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from wild import Flat, Net, block_rows, error, randomise

import mbv2_kernels as mbv2
from mbv2_kernels.fused_forward import FusedForward

X = (2, 3, 33, 36)


@pytest.fixture
def net() -> nn.Module:
    return randomise(Net())


rows = block_rows


def ran(model: nn.Module) -> set[str | None]:
    return {row.backend for row in mbv2.summary(model)}


# --- what stays ------------------------------------------------------------------------------------------------------


def test_returns_the_model_and_computes_the_same(net: nn.Module) -> None:
    x = torch.randn(X)
    with torch.no_grad():
        expected = net(x)
        assert mbv2.fuse(net, strict=True) is net
        assert error(net(x), expected) < 4e-6
    assert ran(net) == {"cpu"}


def test_state_dict_names_modules_and_identity_stay(net: nn.Module) -> None:
    def picture() -> list[object]:
        return [
            list(net.state_dict()),
            list(net.state_dict()._metadata),
            [(name, id(p)) for name, p in net.named_parameters()],
            [(name, id(b)) for name, b in net.named_buffers()],
            [(name, id(m), type(m)) for name, m in net.named_modules()],
            repr(net),
        ]

    before = picture()
    mbv2.fuse(net)
    assert picture() == before
    assert isinstance(net.blocks[1], Flat) and net.blocks[2].identity is True
    mbv2.unfuse(net)
    assert picture() == before


def test_load_state_dict_into_and_out_of_a_fused_model(net: nn.Module) -> None:
    other = randomise(Net(), seed=1)
    x = torch.randn(X)
    with torch.no_grad():
        expected = other(x)
        mbv2.fuse(net)(x)
        net.load_state_dict(other.state_dict())
        assert error(net(x), expected) < 4e-6
        fresh = Net().eval()
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(fresh(x), expected)


def test_a_fused_model_is_freed() -> None:
    """What each call looks at refers to the model; that must not keep it alive."""
    net = mbv2.fuse(randomise(Net()))
    with torch.no_grad():
        net(torch.randn(X))
        for block in net.blocks:
            block(block.conv[0].weight.new_zeros(1, block.forward.in_channels, 4, 4))
    modules = [weakref.ref(module) for module in net.modules()]
    del net, block
    gc.collect()
    assert not any(module() for module in modules)


def test_unfuse_is_exact(net: nn.Module) -> None:
    x = torch.randn(X)
    attributes = [sorted(vars(m)) for m in net.modules()]
    with torch.no_grad():
        expected = net(x)
        mbv2.fuse(net)(x)
        assert mbv2.unfuse(net) is net
        assert torch.equal(net(x), expected)
    assert [sorted(vars(m)) for m in net.modules()] == attributes
    assert mbv2.unfuse(net) is net
    assert all(row.reason.startswith("can be fused") for row in rows(net))


@pytest.mark.parametrize("clone", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_and_independent(net: nn.Module, clone: str, tmp_path: Path) -> None:
    x = torch.randn(X)
    mbv2.fuse(net)
    with torch.no_grad():
        expected = net(x)
        if clone == "deepcopy":
            twin = copy.deepcopy(net)
        elif clone == "pickle":
            twin = pickle.loads(pickle.dumps(net))
        else:
            torch.save(net, tmp_path / "net.pt")
            twin = torch.load(tmp_path / "net.pt", weights_only=False)
        assert torch.equal(twin(x), expected) and ran(twin) == {"cpu"}
        for ours, theirs in zip(net.blocks, twin.blocks, strict=True):
            assert theirs.forward.block is theirs and {w.module for w in theirs.forward.watched} == set(
                theirs.modules()
            )
            assert ours.forward.block is ours
        for p in twin.parameters():
            p.mul_(1.5)
        assert error(twin(x), mbv2.unfuse(copy.deepcopy(twin))(x)) < 4e-6
        assert torch.equal(net(x), expected)
    mbv2.unfuse(twin)
    assert all(isinstance(vars(block)["forward"], FusedForward) for block in net.blocks)


def test_shallow_copy_of_a_block_computes_the_same() -> None:
    block = mbv2.fuse(randomise(Flat()))
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        assert torch.equal(copy.copy(block)(x), block(x))


def test_slicing_into_a_fused_block(net: nn.Module) -> None:
    """SSDLite runs the expand layer and the rest of a block apart."""
    block = mbv2.fuse(net).blocks[1]
    x = torch.randn(2, 8, 9, 12)
    with torch.no_grad():
        hidden = block.conv[:3](x)
        assert error(block.conv[3:](hidden), block(x)) < 2e-6


def test_hooks_on_a_block_fire(net: nn.Module) -> None:
    seen: list[str] = []
    block = net.blocks[1]
    block.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    mbv2.fuse(net)
    block.register_forward_hook(lambda m, args, y: seen.append("forward"))
    block.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    net(torch.randn(X)).sum().backward()
    assert seen == ["pre", "forward", "backward"]
    assert rows(net)[1].fused and rows(net)[1].backend == "cpu"


def test_optimizer_made_before_fuse_keeps_working(net: nn.Module) -> None:
    reference = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    mbv2.fuse(net)
    x = torch.randn(X)
    for model, steps in ((net, optimizer), (reference, torch.optim.SGD(reference.parameters(), lr=0.1))):
        for _ in range(2):
            steps.zero_grad()
            model(x).square().mean().backward()  # eval mode: fine-tuning with frozen BatchNorm
            steps.step()
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        assert error(ours, theirs) < 1e-5
    assert ran(net) == {"cpu"}


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Its hooks sit on the parameters: gradients must arrive at the very objects it saw."""
    if not torch.distributed.is_available():
        pytest.skip("this torch is built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = randomise(Net())
        x = torch.randn(X)
        net(x).sum().backward()
        expected = [p.grad.clone() for p in net.parameters()]
        ddp = nn.parallel.DistributedDataParallel(net)
        assert mbv2.fuse(ddp) is ddp
        net.zero_grad()
        ddp(x).sum().backward()
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            assert error(parameter.grad, gradient) < 1e-5
        assert [row.path for row in rows(ddp)] == ["module.blocks.0", "module.blocks.1", "module.blocks.2"]
        assert ran(ddp) == {"cpu"}
    finally:
        torch.distributed.destroy_process_group()


def test_functional_call_uses_the_given_parameters(net: nn.Module) -> None:
    other = dict(randomise(Net(), seed=1).state_dict())
    x = torch.randn(X)
    with torch.no_grad():
        expected = torch.func.functional_call(net, other, (x,))
        assert error(torch.func.functional_call(mbv2.fuse(net), other, (x,)), expected) < 4e-6


def test_to_half_and_back(net: nn.Module) -> None:
    mbv2.fuse(net)
    x = torch.randn(X)
    with torch.no_grad():
        expected = net(x)
        assert error(net.to(torch.bfloat16)(x.bfloat16()), expected) < 5e-2
        assert ran(net) == {"cpu"}


# --- when the original modules run ------------------------------------------------------------------------------------


def test_training_mode_runs_fused(net: nn.Module) -> None:
    """Gradients and statistics: tests/test_training.py."""
    reference = copy.deepcopy(net)
    mbv2.fuse(net)
    x = torch.randn(X)
    for model in (net, reference):
        model.train()
        model(x).square().sum().backward()
    for (name, ours), theirs in zip(net.named_parameters(), reference.parameters(), strict=True):
        # A block's last bias has no effect through the next block's BatchNorm: a gradient of rounding noise.
        assert error(ours.grad, theirs.grad) < 1e-4 or theirs.grad.norm() < 1e-6, name
    for ours, theirs in zip(net.buffers(), reference.buffers(), strict=True):
        assert error(ours, theirs) < 1e-5
    assert all(row.fused and row.backend == "cpu" and row.reason == "" for row in rows(net))
    net.eval()
    with torch.no_grad():
        assert error(net(x), reference.eval()(x)) < 1e-5
    assert ran(net) == {"cpu"} and all(row.reason == "" for row in rows(net))


def test_a_norm_that_trains_in_its_own_way_runs_the_original() -> None:
    class Renorm(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.1 if self.training else 1.0)

    block = Flat()
    block.conv[7] = Renorm(8)
    mbv2.fuse(randomise(block), strict=True)
    x = torch.randn(2, 8, 9, 9)
    block(x)
    assert rows(block)[0].backend == "cpu"
    block.train()
    block(x)
    assert rows(block)[0].backend == "original modules"
    assert "Renorm does something else in training mode" in rows(block)[0].reason


def test_frozen_norms_in_training_mode_run_fused(net: nn.Module) -> None:
    mbv2.fuse(net).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    net(torch.randn(X)).sum().backward()
    assert ran(net) == {"cpu"}


def test_active_dropout_runs_the_original() -> None:
    block = Flat()
    block.conv.append(nn.Dropout2d(0.5))
    mbv2.fuse(randomise(block), strict=True)
    block.conv[8].train()
    block(torch.randn(2, 8, 9, 9))
    assert rows(block)[0].reason == "training: original modules (Dropout2d is active)"
    block.conv[8].p = 0.0
    block(torch.randn(2, 8, 9, 9))
    assert rows(block)[0].backend == "cpu"


def test_functional_dropout_is_found_by_running_it() -> None:
    class Dropping(Flat):
        def forward(self, x: Tensor) -> Tensor:
            return x + nn.functional.dropout(self.conv(x), 0.5, self.training)

    block = mbv2.fuse(randomise(Dropping()), strict=True)
    block.training = True  # its norms stay in eval mode
    x = torch.randn(2, 8, 9, 9)
    assert not torch.equal(block(x), block(x))
    assert "looks at its training flag" in rows(block)[0].reason


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    ],
)
def test_hooks_inside_a_block_run_the_original(net: nn.Module, register: Callable[[nn.Module], object]) -> None:
    x = torch.randn(X)
    with torch.no_grad():
        expected = net.blocks[1](net.blocks[0](net.stem(x)))
    mbv2.fuse(net)
    handle = register(net.blocks[1].conv[3])
    net(x)
    row = rows(net)[1]
    assert not row.fused and row.reason == "hooks on Conv2d inside the block would not fire"
    assert row.backend == "original modules"
    handle.remove()
    with torch.no_grad():
        assert error(net.blocks[1](net.blocks[0](net.stem(x))), expected) < 4e-6
    assert rows(net)[1].fused and rows(net)[1].backend == "cpu"


def test_forward_hook_inside_a_block_sees_the_hidden_tensor(net: nn.Module) -> None:
    mbv2.fuse(net)
    seen: list[torch.Size] = []
    net.blocks[1].conv[3].register_forward_hook(lambda m, args, y: seen.append(y.shape))
    net(torch.randn(X))
    assert seen == [torch.Size((2, 48, 9, 9))]


def test_global_hooks_run_the_original(net: nn.Module) -> None:
    mbv2.fuse(net)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        net(torch.randn(X))
        assert not rows(net)[0].fused and "global module hooks" in rows(net)[0].reason
    finally:
        handle.remove()
    assert set(net.blocks[1].conv) <= set(seen)


def test_pruning_runs_the_original(net: nn.Module) -> None:
    mbv2.fuse(net)
    prune.random_unstructured(net.blocks[1].conv[0], "weight", 0.5)
    x = torch.randn(X)
    with torch.no_grad():
        y = net(x)
        assert torch.equal(net.blocks[1].conv[0].weight == 0, net.blocks[1].conv[0].weight_mask == 0)
        assert error(y, mbv2.unfuse(copy.deepcopy(net))(x)) < 4e-6
    assert rows(net)[1].backend == "original modules" and "hooks on Conv2d" in rows(net)[1].reason


def test_parametrization_after_fuse_is_followed(net: nn.Module) -> None:
    mbv2.fuse(net)
    x = torch.randn(X)
    nn.utils.parametrizations.weight_norm(net.blocks[1].conv[3])
    with torch.no_grad():
        net.blocks[1].conv[3].parametrizations.weight.original0.mul_(2)
        assert error(net(x), mbv2.unfuse(copy.deepcopy(net))(x)) < 4e-6
    net(x).sum().backward()
    assert net.blocks[1].conv[3].parametrizations.weight.original0.grad.abs().sum() > 0
    assert ran(net) == {"cpu"}


def test_double_runs_the_original_with_one_warning(net: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(X, dtype=torch.float64)
    net.double()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "mbv2_kernels"):
        expected = net(x)
        mbv2.fuse(net)
        assert torch.equal(net(x), expected) and torch.equal(net(x), expected)
    assert len(caplog.records) == 4  # one for the stem and one a block
    assert "torch.float64 is not computed by the kernels" in caplog.records[1].message
    assert "'blocks.0'" in caplog.records[1].message
    assert rows(net)[0].reason == "torch.float64 is not computed by the kernels"


def test_wrong_input_raises_what_the_original_raises(net: nn.Module) -> None:
    block = mbv2.fuse(net).blocks[1]
    x = torch.randn(2, 8, 9, 9)
    for wrong in (torch.randn(2, 9, 9, 9), torch.randn(2, 9, 9), x.bfloat16(), x.int()):
        with pytest.raises((RuntimeError, ValueError)) as ours:
            block(wrong)
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            type(block).forward(block, wrong)
        assert str(ours.value) == str(theirs.value)


def test_extra_arguments_reach_the_original() -> None:
    class Gated(Flat):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            y = x + self.conv(x)
            return y if gate is None else y * gate

    block = mbv2.fuse(randomise(Gated()), strict=True)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        assert torch.equal(block(x, gate=torch.zeros(1)), torch.zeros(2, 8, 9, 9))
        assert rows(block)[0].reason == "called with more than one argument"
        block(x)
    assert rows(block)[0].backend == "cpu"


def test_symbolic_trace_sees_the_original_modules(net: nn.Module) -> None:
    x = torch.randn(X)
    with torch.no_grad():
        expected = net(x)
        graph = torch.fx.symbolic_trace(mbv2.fuse(net))
        assert torch.equal(graph(x), expected)
    assert sum(node.op == "call_module" for node in graph.graph.nodes) > 20


# --- arguments and reports --------------------------------------------------------------------------------------------


def test_filter(net: nn.Module) -> None:
    asked: list[tuple[type, str]] = []

    def only_the_last(module: nn.Module, path: str) -> bool:
        asked.append((type(module), path))
        return path == "blocks.2"

    mbv2.fuse(net, filter_fn=only_the_last)
    assert asked == [(nn.Sequential, "stem"), (Flat, "blocks.0"), (Flat, "blocks.1"), (Flat, "blocks.2")]
    assert [row.fused for row in rows(net)] == [False, False, True]
    assert rows(net)[0].reason == "can be fused: fuse() was not called on it, or its filter_fn left it out"
    mbv2.fuse(net, filter_fn=lambda m, path: path == "blocks.0")
    assert [row.fused for row in rows(net)] == [True, False, True]


def test_strict_names_what_is_refused_and_changes_nothing(net: nn.Module) -> None:
    net.blocks[1].conv[5] = nn.Hardswish()
    with pytest.raises(RuntimeError) as caught:
        mbv2.fuse(net, strict=True)
    head, line = str(caught.value).splitlines()
    assert head == "fuse(strict=True): 1 of 3 blocks cannot be fused, the model is unchanged:"
    assert line.startswith("  blocks.1 (Flat): activation Hardswish is not computed by the kernel")
    assert not any("forward" in vars(m) for m in net.modules())
    mbv2.fuse(net, strict=True, filter_fn=lambda m, path: path != "blocks.1")
    assert sum(row.fused for row in rows(net)) == 2


def test_strict_with_nothing_to_fuse() -> None:
    with pytest.raises(RuntimeError, match="no block"):
        mbv2.fuse(nn.Linear(2, 2), strict=True)
    with pytest.raises(RuntimeError, match="no block"):
        mbv2.fuse(Net(), strict=True, filter_fn=lambda *_: False)
    assert str(mbv2.summary(mbv2.fuse(nn.Linear(2, 2)))).splitlines()[-1] == "0 of 0 blocks fused"


@pytest.mark.parametrize("function", [mbv2.fuse, mbv2.unfuse, mbv2.summary])
def test_not_a_module(function: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        function({})


def test_filter_that_cannot_be_called(net: nn.Module) -> None:
    with pytest.raises(TypeError, match="filter_fn must be callable"):
        mbv2.fuse(net, filter_fn="blocks")


def test_an_error_in_the_filter_changes_nothing(net: nn.Module) -> None:
    with pytest.raises(ZeroDivisionError):
        mbv2.fuse(net, filter_fn=lambda m, path: 1 / (path != "blocks.2"))
    assert not any("forward" in vars(m) for m in net.modules())


def test_fuse_again_checks_again(net: nn.Module) -> None:
    mbv2.fuse(net)
    x = torch.randn(X)
    net(x)
    net.blocks[1].conv[3].stride = (1, 1)
    net.blocks[2].conv[2] = nn.Hardswish()
    mbv2.fuse(net)
    assert [row.fused for row in rows(net)] == [True, True, False]
    with torch.no_grad():
        assert error(net(x), mbv2.unfuse(copy.deepcopy(net))(x)) < 4e-6


def test_fuse_again_after_an_edit_through_data(net: nn.Module) -> None:
    """`.data` bypasses the version counter; fuse() drops what was folded."""
    x = torch.randn(X)
    with torch.no_grad():
        mbv2.fuse(net)(x)
        for p in net.blocks.parameters():
            p.data.mul_(1.25)
        assert error(mbv2.fuse(net)(x), mbv2.unfuse(copy.deepcopy(net))(x)) < 4e-6


def test_report(net: nn.Module) -> None:
    mbv2.fuse(net)
    report = mbv2.summary(net)
    assert len(report) == 4 and report[0] == next(iter(report))
    assert report[1] == mbv2.FusionRow("blocks.0", "Flat", "depthwise_separable", True, "", None, None)
    assert [row.kind for row in report] == ["stem", "depthwise_separable", "inverted_residual", "inverted_residual"]
    lines = str(report).splitlines()
    assert lines[-1] == "3 of 3 blocks fused, 1 of 1 layers around them" and len(lines) == 7
    assert lines[0].split() == ["block", "class", "kind", "fused", "backend", "tier", "reason"]
    assert lines[3].split()[:4] == ["blocks.0", "Flat", "depthwise_separable", "yes"]
    with pytest.raises(AttributeError):
        report[0].fused = False
    net(torch.randn(X))
    assert {(row.backend, row.tier) for row in mbv2.summary(net)} == {("cpu", mbv2._C.active_tier())}


def test_summary_changes_nothing(net: nn.Module) -> None:
    state = torch.get_rng_state()
    mbv2.summary(net)
    assert not any("forward" in vars(m) for m in net.modules())
    assert torch.equal(state, torch.get_rng_state())


# --- compilers and exporters ------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_without_breaks_or_recompiles(net: nn.Module) -> None:
    mbv2.fuse(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for seed in range(2):
            torch.manual_seed(seed)
            x = torch.randn(X)
            with torch._dynamo.config.patch(error_on_recompile=seed > 0):
                assert torch.equal(compiled(x), net(x))
    assert ran(net) == {"cpu"}


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_notices_what_changes_the_decision(net: nn.Module) -> None:
    mbv2.fuse(net)
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.randn(X)
    with torch.no_grad():
        with_residual = compiled(x)
        net.blocks[2].identity = False
        without = compiled(x)
        assert error(without, with_residual) > 1e-2
        assert error(without, mbv2.unfuse(copy.deepcopy(net))(x)) < 4e-6
        net.blocks[2].identity = True
        net.blocks[1].conv[7] = copy.deepcopy(net.blocks[1].conv[7])
        net.blocks[1].conv[7].weight.mul_(2)
        assert error(compiled(x), mbv2.unfuse(copy.deepcopy(net))(x)) < 4e-6
        net.train()
        assert error(compiled(x), mbv2.unfuse(copy.deepcopy(net))(x)) < 4e-6
        net.eval()
        assert error(compiled(x), mbv2.unfuse(copy.deepcopy(net))(x)) < 4e-6


@pytest.mark.usefixtures("fresh_dynamo")
def test_fuse_and_unfuse_after_compile(net: nn.Module) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter)
    x = torch.randn(X)
    with torch.no_grad():
        expected = compiled(x)
        mbv2.fuse(net)
        assert error(compiled(x), expected) < 4e-6 and counter.frame_count == 2
        mbv2.unfuse(net)
        assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(net: nn.Module, strict: bool) -> None:
    mbv2.fuse(net)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.randn(X),), dynamic_shapes=({0: batch},), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if "mbv2" in str(node.target)]
    assert called == ["mbv2.conv_bn_act.default"] + ["mbv2.inverted_residual_bn.default"] * 3
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for n in (1, 2, 5):
        x = torch.randn(n, *X[1:])
        with torch.no_grad():
            assert error(again(x), net(x)) < 1e-6


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_export_takes_the_original_modules(net: nn.Module, dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the exported file")
    if dynamo:
        pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs it")
    mbv2.fuse(net)
    x = torch.randn(X)
    with torch.no_grad():
        expected = net(x)
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=dynamo)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert error(torch.from_numpy(y), expected) < 1e-5


def test_jit_trace(net: nn.Module) -> None:
    mbv2.fuse(net)
    x = torch.randn(X)
    with torch.no_grad():
        traced = torch.jit.trace(net, x)
        assert error(traced(torch.ones(X)), net(torch.ones(X))) < 1e-6
