"""A training step of one fused block, stem or head against float64 and unfused, in every form that it can have."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from blocks import GRADIENT_BOUNDS, relative_error
from torch import Tensor, nn
from training_blocks import Block, DenseLayer, check_step, fused, step

import mbv2_kernels as mbv2
from mbv2_kernels import FusedInvertedResidual

FORMS: dict[str, dict[str, Any]] = {
    "residual": {},
    "stride2": {"out_channels": 12, "stride": 2},
    "k5_dilated": {"kernel_size": 5, "dilation": 2},
    "same_stride2": {"same": True, "stride": 2},
    "relu": {"activation": nn.ReLU},
    "no_expand_final": {"expand": False, "final": nn.ReLU6, "out_channels": 16},
    "final_relu": {"final": nn.ReLU},
    "not_affine": {"affine": False},
    "biases": {"bias": True},
    "no_first_norm": {"norms": (False, True, True), "bias": True},
    "no_second_norm": {"norms": (True, False, True)},
    "no_last_norm": {"norms": (True, True, False), "bias": True},
    "cumulative": {"momentum": None},
    "odd_channels": {"in_channels": 5, "hidden": 17, "out_channels": 5},
    "wide": {"in_channels": 24, "hidden": 144, "out_channels": 24},
    "many_outputs": {"in_channels": 64, "hidden": 136, "out_channels": 72},  # g2 is kept
}


LAYERS: dict[str, dict[str, Any]] = {
    "stem": {"in_channels": 3},
    "stem_k5_stride1": {"in_channels": 4, "kernel_size": 5, "stride": 1, "out_channels": 17},
    "stem_k7_relu": {"in_channels": 1, "kernel_size": 7, "activation": nn.ReLU, "out_channels": 40},
    "stem_same": {"in_channels": 3, "same": True},
    "stem_linear": {"in_channels": 2, "activation": nn.Identity, "out_channels": 5},
    "stem_bias": {"in_channels": 3, "bias": True, "momentum": None},
    "stem_not_affine": {"in_channels": 3, "affine": False},
    "head": {"in_channels": 24, "kernel_size": 1, "stride": 1, "out_channels": 72},
    "head_relu": {"in_channels": 9, "kernel_size": 1, "stride": 1, "out_channels": 33, "activation": nn.ReLU},
    "head_bias": {"in_channels": 8, "kernel_size": 1, "stride": 1, "bias": True, "momentum": None},
    "head_not_affine": {"in_channels": 5, "kernel_size": 1, "stride": 1, "affine": False},
}


def layer(form: str) -> DenseLayer:
    return DenseLayer(**LAYERS[form])


@pytest.mark.parametrize("form", LAYERS)
def test_step_of_a_layer_in_float32(form: str) -> None:
    check_step(layer(form), 3, LAYERS[form]["in_channels"], 15, 12)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("form", ("stem", "stem_bias", "head", "head_relu"))
def test_step_of_a_layer_in_16_bits(form: str, dtype: torch.dtype) -> None:
    check_step(layer(form).to(dtype), 4, LAYERS[form]["in_channels"], 24, 20, dtype=dtype)


@pytest.mark.parametrize("form", ("stem", "head"))
@pytest.mark.parametrize("learned", ("conv", "norm.weight", "norm.bias", "x"))
def test_partly_frozen_layers(learned: str, form: str) -> None:
    """What does not require a gradient gets none, not even a picture's is computed; and the rest is as ever."""
    model = layer(form)
    x = torch.randn(2, LAYERS[form]["in_channels"], 9, 9)
    full = step(fused(model), x)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(learned))
    ours = fused(model)
    x.requires_grad_(learned == "x")
    y = ours(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    gradients = {"x": x.grad, **{name: p.grad for name, p in ours.named_parameters()}}
    for name, gradient in gradients.items():
        assert torch.equal(gradient, full[name]) if name.startswith(learned) else gradient is None, name


def test_what_a_layer_keeps() -> None:
    """Beside its input and its parameters: a stem nothing of an image's size, a head its output before the norm."""
    for form, expected in (("stem", 0), ("head", 4 * 2 * 72 * 31 * 30)):
        ours = fused(layer(form))
        x = torch.randn(2, LAYERS[form]["in_channels"], 31, 30)
        images: dict[int, int] = {}

        def pack(t: Tensor, x: Tensor = x, images: dict[int, int] = images) -> Tensor:
            if t.dim() == 4 and len(t) == len(x) and t.data_ptr() != x.data_ptr():
                images[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ours(x)
        assert sum(images.values()) == expected, form


@pytest.mark.parametrize("form", ("stem", "stem_k5_stride1", "head"))
def test_layers_do_not_depend_on_threads(form: str) -> None:
    model, results = layer(form), []
    x = torch.randn(5, LAYERS[form]["in_channels"], 56, 50)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(step(fused(model), x))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("form", ("stem", "head"))
def test_a_layers_batches_of_one_value_and_of_none(form: str) -> None:
    model, channels = layer(form), LAYERS[form]["in_channels"]
    x = torch.randn(1, channels, 1, 1)
    with pytest.raises(ValueError) as theirs:
        copy.deepcopy(model)(x)
    with pytest.raises(ValueError) as ours:
        fused(model)(x)
    assert str(ours.value) == str(theirs.value) and "more than 1 value per channel" in str(ours.value)
    empty = torch.empty(0, channels, 9, 9)
    got, plain = step(fused(model), empty), step(copy.deepcopy(model), empty)
    for name, expected in plain.items():
        assert torch.equal(got[name], expected), name


def test_smooth_pictures() -> None:
    """Neighbouring pixels are so alike that what an edge filter sees varies far less than the picture."""
    model = layer("stem")
    with torch.no_grad():
        model.conv.weight -= model.conv.weight.mean((1, 2, 3), keepdim=True)
    ramp = torch.linspace(-5, 5, 64).expand(4, 3, 64, 64) + 1e-3 * torch.randn(4, 3, 64, 64)
    inner = ramp[..., 1:-1, 1:-1]  # without padding, whose zeros are an edge
    model.conv.padding = (0, 0)
    plain, exact = step(copy.deepcopy(model), inner), step(copy.deepcopy(model).double(), inner.double())
    got = step(fused(model), inner)
    for name in ("norm.running_var", "norm.running_mean", "y"):
        assert relative_error(got[name], exact[name]) < 2 * relative_error(plain[name], exact[name]) + 2e-7, name


def test_a_picture_is_read_as_it_lies() -> None:
    """Planes, pixels, a slice of a larger picture: the same numbers, but for the order in which some are added."""
    model = layer("stem")
    x = torch.randn(2, 3, 20, 22)
    expected = step(fused(model), x)
    larger = torch.randn(2, 5, 24, 26)
    larger[:, 1:4, 2:22, 3:25] = x
    for other in (x.to(memory_format=torch.channels_last), larger[:, 1:4, 2:22, 3:25], x.mT.contiguous().mT):
        got = step(fused(model), other)
        for name, tensor in expected.items():
            bound = GRADIENT_BOUNDS[torch.float32] if tensor.is_floating_point() else 1e-9
            assert relative_error(got[name], tensor.double()) < bound, name


def test_strided_heads_train_in_their_original_modules() -> None:
    model = fused(layer("head").requires_grad_())
    model.conv.stride = (2, 2)
    mbv2.fuse(model)
    x = torch.randn(2, 24, 9, 9)
    got, expected = step(model, x), step(mbv2.unfuse(copy.deepcopy(model)), x)
    (row,) = mbv2.summary(model)
    assert row.fused and row.backend == "original modules"
    assert row.reason == "training: original modules (a 1x1 convolution with stride or padding)"
    assert torch.equal(got["conv.weight"], expected["conv.weight"])


@pytest.mark.parametrize("form", FORMS)
def test_step_in_float32(form: str) -> None:
    options = FORMS[form]
    check_step(Block(**options), 3, options.get("in_channels", 8), 13, 10)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("form", ("residual", "stride2", "no_expand_final"))
def test_step_in_16_bits(form: str, dtype: torch.dtype) -> None:
    check_step(Block(**FORMS[form]).to(dtype), 4, 8, 24, 20, dtype=dtype)


@pytest.mark.parametrize("frozen", range(1, 8))
def test_frozen_norms_in_any_mix(frozen: int) -> None:
    """A BatchNorm in eval mode uses its running statistics, leaves them alone, and still passes gradients."""
    model = Block(bias=True)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.train(not frozen >> i & 1)
    check_step(model, 3, 8, 11, 9)


@pytest.mark.parametrize("learned", ("depthwise", "before.0", "before.1", "after.0", "after.2", "after.3", "x", ""))
def test_partly_frozen_parameters(learned: str) -> None:
    """What does not require a gradient gets none, and the rest gets the same as ever."""
    model = Block()
    x = torch.randn(2, 8, 9, 9)
    full = step(fused(model), x)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(learned) and learned != "")
    ours = fused(model)
    x.requires_grad_(learned == "x")
    y = ours(x)
    assert y.requires_grad == bool(learned)
    if not learned:
        return
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    names = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert names or learned == "x"
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == (name in names), name
    for name in names:
        assert torch.equal(ours.get_parameter(name).grad, full[name]), name
    if learned == "x":
        assert torch.equal(x.grad, full["x"])


def test_lean_memory_changes_nothing_but_memory() -> None:
    model = Block().bfloat16()
    x = torch.randn(2, 8, 12, 11).bfloat16()
    kept: dict[str, int] = {}
    results = []
    for memory in ("fast", "lean"):
        seen: dict[int, int] = {}
        ours = fused(model, memory=memory)

        def pack(t: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            results.append(step(ours, x))
        kept[memory] = sum(seen.values())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert kept["fast"] - kept["lean"] == 2 * 24 * 12 * 11 * 2  # d


def test_results_do_not_depend_on_threads() -> None:
    model = Block(24, 24, 144)
    x = torch.randn(5, 24, 28, 28)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(step(fused(model), x))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_one_value_a_channel_raises_as_torch_does() -> None:
    for form in ({}, {"stride": 2}, {"expand": False}):
        model = Block(**form)
        x = torch.randn(1, 8, 2 if form.get("stride") else 1, 1)
        with pytest.raises(ValueError) as theirs:
            copy.deepcopy(model)(x)
        with pytest.raises(ValueError) as ours:
            fused(model)(x)
        assert str(ours.value) == str(theirs.value) and "more than 1 value per channel" in str(ours.value)


def test_an_empty_batch_leaves_the_statistics() -> None:
    """But counts, as torch has it."""
    model = Block()
    x = torch.empty(0, 8, 9, 9)
    ours, plain = step(fused(model), x), step(copy.deepcopy(model), x)
    for name, expected in plain.items():
        assert torch.equal(ours[name], expected), name


def test_batches_far_from_zero() -> None:
    """Statistics come from sums: they must not cancel where the mean is large beside the deviation."""
    model = Block(norms=(True, True, True))
    x = torch.randn(4, 8, 16, 16) * 0.1 + 10
    plain, exact, got = step(copy.deepcopy(model), x), step(copy.deepcopy(model).double(), x.double()), None
    got = step(fused(model), x)
    for name in ("before.1.running_var", "before.1.running_mean", "y"):
        error = ((got[name] - exact[name]).norm() / exact[name].norm()).item()
        unfused = ((plain[name] - exact[name]).norm() / exact[name].norm()).item()
        assert error < 2 * unfused + 2e-7, f"{name}: {error:.1e}, unfused {unfused:.1e}"


def test_nan_and_infinity_flow() -> None:
    model = Block(out_channels=12)
    x = torch.randn(2, 8, 9, 9)
    x[0, 0, 0, 0] = math.nan
    got = step(fused(model), x)
    assert got["y"].isnan().any() and got["x"].isnan().any()


def test_strides_of_input_and_gradient_do_not_matter() -> None:
    model = fused(Block())
    x = torch.randn(2, 8, 10, 12)
    expected = step(copy.deepcopy(model), x, torch.ones(2, 8, 10, 12))
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        got = step(copy.deepcopy(model), other, torch.ones(1).expand(2, 8, 10, 12))
        assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("frozen", (False, True))
def test_gradients_have_the_strides_of_their_parameters(frozen: bool) -> None:
    """In channels_last a 1x1 weight has others than a contiguous one, though the same numbers at the same places."""
    model = Block(bias=True).to(memory_format=torch.channels_last)
    model.train(not frozen)
    model.depthwise.weight.data = model.depthwise.weight.data.transpose(2, 3)
    ours, plain = fused(model), copy.deepcopy(model)
    x = torch.randn(2, 8, 9, 7)
    got, expected = step(ours, x), step(plain, x)
    for name, parameter in ours.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name
        assert torch.allclose(got[name], expected[name], rtol=1e-3, atol=1e-3), name


def test_a_few_optimiser_steps_in_a_small_network() -> None:
    """Losses, weights and running statistics stay together over steps, and eval mode sees the trained weights."""
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        FusedInvertedResidual(8, 8, expand_ratio=1),
        FusedInvertedResidual(8, 16, stride=2),
        FusedInvertedResidual(16, 16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    mbv2.unfuse(plain)
    models = [fused(plain), plain, copy.deepcopy(plain).double()]
    x, labels = torch.randn(16, 3, 32, 32), torch.randint(4, (16,))
    losses = []
    for model in models:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for _ in range(6):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)), labels)
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
        with torch.no_grad():
            losses[-1].append(model.eval()(x.to(model[0].weight.dtype)).norm().item())
    ours, theirs, exact = (torch.tensor(row, dtype=torch.float64) for row in losses)
    assert exact[5] < 0.9 * exact[0]
    assert ((ours - exact).abs() / exact).max() < max(1e-5, 3 * ((theirs - exact).abs() / exact).max())
    assert {row.backend for row in mbv2.summary(models[0]) if row.fused} == {"cpu"}
    for (name, ours), plain, expected in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), models[2].state_dict().values(), strict=True
    ):
        if ours.is_floating_point():
            assert relative_error(ours, expected) < 3 * relative_error(plain, expected) + 1e-5, name
