"""FusedInvertedResidual: layout, behaviour, arguments."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from wild import error, randomise

import mbv2_kernels as mbv2
from mbv2_kernels import FusedInvertedResidual, reference
from mbv2_kernels.fold import fold
from mbv2_kernels.recognise import candidates

CASES = [
    {"in_channels": 8, "out_channels": 8},
    {"in_channels": 8, "out_channels": 12},
    {"in_channels": 8, "out_channels": 8, "stride": 2},
    {"in_channels": 8, "out_channels": 8, "expand_ratio": 1},
    {"in_channels": 7, "out_channels": 7, "expand_ratio": 1.5, "kernel_size": 5, "activation": "relu"},
    {"in_channels": 8, "out_channels": 8, "dilation": 2, "kernel_size": 7, "eps": 1e-3, "momentum": None},
]


@pytest.mark.parametrize("kwargs", CASES)
def test_eval_forward_and_backward_agree_with_the_reference(kwargs: dict[str, object]) -> None:
    block = randomise(FusedInvertedResidual(**kwargs))
    forward = block.forward
    x = torch.randn(2, block.forward.in_channels, 9, 12, requires_grad=True)
    y = block(x)
    exact = copy.deepcopy(block).double()
    weights = fold(exact.forward.tensors(), exact.forward.eps())
    x64 = x.detach().double().requires_grad_()
    expected = reference.inverted_residual(x64, *weights, **forward.config._asdict())
    assert y.shape == expected.shape and error(y, expected) < 2e-6
    y.square().sum().backward()
    expected.square().sum().backward()
    assert error(x.grad, x64.grad) < 1e-5
    for ours, theirs in zip(block.parameters(), exact.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < 1e-5
    (row,) = mbv2.summary(block)
    assert row.fused and row.backend == "cpu" and row.class_name == "FusedInvertedResidual"


@pytest.mark.parametrize("kwargs", CASES)
def test_fuse_recognises_the_same(kwargs: dict[str, object]) -> None:
    block = FusedInvertedResidual(**kwargs)
    config = block.forward.config
    mbv2.unfuse(block)
    assert "forward" not in vars(block)
    (candidate,) = candidates(block)
    assert candidate.structure is not None and candidate.structure.config == config
    mbv2.fuse(block, strict=True)
    assert block.forward.config == config


def test_training_updates_statistics_as_the_layers_do() -> None:
    block = FusedInvertedResidual(8, 8)
    plain = mbv2.unfuse(copy.deepcopy(block))
    x = torch.randn(4, 8, 9, 9)
    assert error(block(x), plain(x)) < 2e-6
    for ours, theirs in zip(block.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert mbv2.summary(block)[0].backend == "cpu" and mbv2.summary(block)[0].reason == ""


def test_memory_is_checked() -> None:
    with pytest.raises(ValueError, match="memory must be one of fast, lean, got 'small'"):
        FusedInvertedResidual(8, 8, memory="small")
    with pytest.raises(ValueError, match="memory must be one of fast, lean, got 'small'"):
        mbv2.fuse(nn.Sequential(), memory="small")


def test_state_dict_is_torchvisions() -> None:
    mobilenetv2 = pytest.importorskip("torchvision.models.mobilenetv2", reason="compares with torchvision's block")
    for t, stride in ((1, 1), (6, 1), (6, 2)):
        theirs = randomise(mobilenetv2.InvertedResidual(8, 8, stride, t))
        ours = FusedInvertedResidual(8, 8, stride=stride, expand_ratio=t).eval()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(1, 8, 9, 9)
        with torch.no_grad():
            assert error(ours(x), theirs(x)) < 2e-6
        assert ours.use_res_connect == theirs.use_res_connect


def test_copies() -> None:
    block = randomise(FusedInvertedResidual(8, 8))
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert twin.forward.block is twin and torch.equal(twin(x), block(x))


def test_subclass_with_its_own_forward_keeps_it() -> None:
    class Doubled(FusedInvertedResidual):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block = Doubled(8, 8).eval()
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        assert torch.equal(block(x), 2 * (x + block.conv(x)))


def test_subclass_that_changes_a_layer_is_noticed() -> None:
    class Hard(FusedInvertedResidual):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.conv[0][2] = nn.Hardswish()

    block = Hard().eval()
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        assert torch.equal(block(x), x + block.conv(x))
    assert not mbv2.summary(block)[0].fused


@pytest.mark.parametrize(
    ("kwargs", "error_type", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be positive, got 0"),
        ({"in_channels": 8.0}, TypeError, "in_channels must be an int, got float"),
        ({"out_channels": True}, TypeError, "out_channels must be an int, got bool"),
        ({"stride": 3}, ValueError, r"stride must be one of \(1, 2\), got 3"),
        ({"stride": (1, 1)}, TypeError, "stride must be an int, got tuple"),
        ({"kernel_size": 4}, ValueError, r"kernel_size must be one of \(3, 5, 7\), got 4"),
        ({"dilation": 0}, ValueError, "dilation must be positive, got 0"),
        ({"expand_ratio": 0.01}, ValueError, "expand_ratio must leave a hidden channel, got 0.01 of 8 channels"),
        ({"expand_ratio": -1}, ValueError, "expand_ratio must be positive, got -1"),
        ({"expand_ratio": "6"}, TypeError, "expand_ratio must be a number, got str"),
        ({"activation": "silu"}, ValueError, 'activation must be "relu6" or "relu", got \'silu\''),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be positive, got nan"),
        ({"momentum": "none"}, TypeError, "momentum must be a number, got str"),
    ],
)
def test_arguments(kwargs: dict[str, object], error_type: type[Exception], message: str) -> None:
    with pytest.raises(error_type, match=message):
        FusedInvertedResidual(**{"in_channels": 8, "out_channels": 8, **kwargs})
