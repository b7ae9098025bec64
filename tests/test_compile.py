"""torch.compile and torch.export of the ops and of fused networks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import EPS, GRADIENT_BOUNDS, double, make_block, make_config, make_weights, relative_error, unfused
from torch import Tensor, nn

import mbv2_kernels
from mbv2_kernels import fold, set_backend
from mbv2_kernels.fold import BlockTensors
from mbv2_kernels.functional import run_block

CONFIG = make_config(residual=True)
OP = torch.ops.mbv2.inverted_residual_bn.default


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    set_backend("auto")


def image(batch: int = 2, height: int = 9, width: int = 7) -> Tensor:
    return torch.randn(batch, 8, height, width)


class Block(nn.Module):
    """A block with BatchNorms in eval mode, as patch.py calls it."""

    def __init__(self, config: Any = CONFIG, **shape: Any) -> None:
        super().__init__()
        tensors = make_block(**shape)
        self.fields = [field for field, t in tensors._asdict().items() if t is not None]
        for field in self.fields:
            tensor = getattr(tensors, field)
            if field.endswith(("mean", "var")):
                self.register_buffer(field, tensor)
            else:
                self.register_parameter(field, nn.Parameter(tensor))
        self.config = config

    def tensors(self) -> BlockTensors:
        return BlockTensors(*(getattr(self, f) if f in self.fields else None for f in BlockTensors._fields))

    def forward(self, x: Tensor) -> Tensor:
        return run_block(x, self.tensors(), EPS, self.config)


def exact(x: Tensor, block: Block) -> Tensor:
    return unfused(x.detach().double(), BlockTensors(*double(block.tensors())), EPS, block.config)


def small_network() -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    setting = [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 1, 1]]
    network = torchvision.models.MobileNetV2(
        num_classes=5, width_mult=0.25, inverted_residual_setting=setting, round_nearest=4
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("grad", [False, True])
def test_block_without_graph_breaks_or_recompilation(grad: bool) -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = image()
            assert relative_error(compiled(x), exact(x, block)) < 2e-6


def test_edits_between_calls_are_noticed_by_compiled_code() -> None:
    block, x = Block(), image()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for field in block.fields:
            before = compiled(x)
            getattr(block, field).add_(0.2)
            assert not compiled(x).equal(before), field
            assert relative_error(compiled(x), exact(x, block)) < 2e-6
        block.load_state_dict({key: value * 0.9 for key, value in block.state_dict().items()})
        assert relative_error(compiled(x), exact(x, block)) < 2e-6


def test_weights_are_packed_once_for_eager_and_compiled() -> None:
    block, x = Block(), image()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    fold.memo.clear()
    with torch.no_grad():
        block(x)
        (record,) = fold.memo._records.values()
        for _ in range(2):
            assert compiled(x).equal(block(x))
        assert list(fold.memo._records.values()) == [record]


def test_the_backend_is_looked_up_at_run_time() -> None:
    block, x = Block(), image()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)
        set_backend("reference")
        compiled(x)
        assert fold.memo.last_run(block.tensors()) == fold.Run("reference")


def test_forward_and_backward() -> None:
    """A frozen-BatchNorm block inside a training step: gradients for x and every parameter."""
    block, x = Block(), image().requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    incoming = torch.randn_like(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            got = torch.autograd.grad(compiled(x), [x, *block.parameters()], incoming)
    wanted = torch.autograd.grad(block(x), [x, *block.parameters()], incoming)
    for g, w in zip(got, wanted, strict=True):
        assert relative_error(g, w.double()) < GRADIENT_BOUNDS[torch.float32]


def test_functional_form() -> None:
    weights, x = make_weights(), image()

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return mbv2_kernels.inverted_residual(x, *weights, stride=2, padding="same") * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert compiled(x, *weights).equal(run(x, *weights))
    with pytest.raises(Exception, match="x must have 8 channels"):
        compiled(x[:, :7], *weights)


def test_function_object() -> None:
    weights, x = make_weights(), image().requires_grad_()

    def run(x: Tensor) -> Tensor:
        return mbv2_kernels.InvertedResidualFunction.apply(x, *weights, *CONFIG)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(run(x).square().sum(), x)
    assert got.equal(wanted)


def test_autocast() -> None:
    block, x = Block(), image()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.float32  # the residual promotes
        assert y.equal(block(x))


def test_dynamic_batch_and_size() -> None:
    block = Block(make_config(stride=2, padding=-1))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(image(2, 9, 7))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for size in ((3, 8, 6), (5, 13, 4)):
                x = image(*size)
                assert relative_error(compiled(x), exact(x, block)) < 2e-6


def test_inductor_on_a_fused_network() -> None:
    network = mbv2_kernels.fuse(small_network())
    assert sum(row.fused for row in mbv2_kernels.summary(network)) == 4 + 2  # stem and head
    compiled = torch.compile(network, fullgraph=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)
        for parameter in network.parameters():
            parameter.mul_(1.1)
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_fused_network_has_one_op_for_each_block() -> None:
    network = mbv2_kernels.fuse(small_network())
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y = torch.compile(network, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(y, network(x))  # not bit by bit: one call's mean over pixels has its own order
    (graph,) = graphs
    assert sum(node.target is OP for node in graph.graph.nodes) == 4


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict: bool) -> None:
    network = mbv2_kernels.fuse(small_network())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},), strict=strict)
    assert sum(node.target is OP for node in program.graph.nodes) == 4
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    with torch.no_grad():
        for n in (1, 5):
            x = torch.randn(n, 3, 32, 32)
            torch.testing.assert_close(loaded(x), network(x), rtol=1e-4, atol=1e-5)
        for parameter in loaded.parameters():
            parameter.zero_()
        assert loaded(x).count_nonzero() == 0  # nothing packed was baked in


def test_export_with_a_dynamic_size() -> None:
    block = Block(make_config(stride=2))
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    module = torch.export.export(block, (image(),), dynamic_shapes=(sizes,)).module()
    for size in ((1, 5, 6), (3, 12, 11)):
        x = image(*size)
        assert relative_error(module(x), exact(x, block)) < 2e-6
