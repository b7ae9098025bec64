"""Folding is exact, and the memo is never stale, never wrong about identity, and lets go of what dies."""

from __future__ import annotations

import copy
import gc
import io
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import EPS, double, make_block, make_config, relative_error, unfused, with_grad
from torch import Tensor, nn

from mbv2_kernels import _C, backends, fold, reference, set_backend
from mbv2_kernels.fold import BlockTensors, Memo, Run, memo
from mbv2_kernels.functional import run_block

CONFIG = make_config(residual=True)


@pytest.fixture(autouse=True)
def _empty_memo() -> Iterator[None]:
    memo.clear()
    yield
    set_backend("auto")
    _C.set_max_isa(None)


def image() -> Tensor:
    return torch.randn(2, 8, 7, 6)


def run(x: Tensor, tensors: BlockTensors, eps: tuple[float, float, float] = EPS) -> Tensor:
    with torch.no_grad():
        return run_block(x, tensors, eps, CONFIG)


def assert_fresh(x: Tensor, tensors: BlockTensors, eps: tuple[float, float, float] = EPS) -> None:
    expected = unfused(x.double(), BlockTensors(*double(tensors)), eps, CONFIG)
    assert relative_error(run(x, tensors, eps), expected) < 2e-6


class Counted:
    """A build function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folded: fold.FoldedWeights) -> Any:
        self.calls += 1
        return folded


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not affine": {"affine": False},
    "convolution bias": {"conv_bias": True},
    "not affine, convolution bias": {"affine": False, "conv_bias": True},
    "no BatchNorm": {"norm": False},
    "no BatchNorm, convolution bias": {"norm": False, "conv_bias": True},
    "no expand": {"expand": False},
}


class TestFold:
    @pytest.mark.parametrize("eps", [(1e-5,) * 3, (1e-3,) * 3, (1e-5, 1e-3, 0.1)])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_exact(self, variant: str, eps: tuple[float, float, float]) -> None:
        tensors = make_block(**VARIANTS[variant], dtype=torch.float64)
        x = image().double()
        folded = fold.fold(tensors, eps)
        assert all(t is None or t.dtype == torch.float64 for t in folded)
        y = reference.inverted_residual(x, *folded, residual=True)
        assert relative_error(y, unfused(x, tensors, eps, CONFIG)) < 1e-14

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_folds_in_float32_at_least_and_rounds_once(self, dtype: torch.dtype) -> None:
        tensors = make_block(conv_bias=True, dtype=dtype)
        exact = fold.fold(BlockTensors(*double(tensors)), EPS)
        for got, want in zip(fold.fold(tensors, EPS), exact, strict=True):
            assert got is not None and want is not None
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, rtol=2**-22, atol=2**-24)

    def test_tiny_variances_and_zero_gammas(self) -> None:
        tensors = make_block()
        assert tensors.expand_var is not None and tensors.project_gamma is not None
        tensors.expand_var.zero_()
        tensors.project_gamma[::2] = 0
        assert_fresh(image(), tensors)

    def test_gradients_flow_to_every_parameter(self) -> None:
        tensors = make_block(conv_bias=True, requires_grad=True)
        sum(t.sum() for t in fold.fold(tensors, EPS) if t is not None).backward()
        assert all(t.grad is not None for t in tensors if t is not None and t.requires_grad)

    def test_refuses_a_batchnorm_without_statistics(self) -> None:
        with pytest.raises(ValueError, match="depthwise_mean and depthwise_var are needed"):
            fold.fold(make_block()._replace(depthwise_mean=None, depthwise_var=None), EPS)


class TestMemo:
    def test_builds_once(self) -> None:
        tensors, build, own = make_block(), Counted(), Memo()
        values = [own.get(tensors, EPS, Run("cpu"), build) for _ in range(3)]
        assert build.calls == 1
        assert values[0] is values[1] is values[2]
        assert len(own) == 1

    def test_one_value_for_each_run(self) -> None:
        tensors, build, own = make_block(), Counted(), Memo()
        for _ in range(2):
            for what in (Run("cpu", "avx2"), Run("cpu", "portable"), Run("triton", None, torch.float16)):
                own.get(tensors, EPS, what, build)
                assert own.last_run(tensors) == what
        assert build.calls == 3
        assert len(own) == 1

    @pytest.mark.parametrize("field", BlockTensors._fields)
    def test_an_edit_of_any_tensor_is_noticed(self, field: str) -> None:
        tensors, x = make_block(conv_bias=True), image()
        before = run(x, tensors)
        getattr(tensors, field).add_(0.25)
        assert not run(x, tensors).equal(before)
        assert_fresh(x, tensors)

    @pytest.mark.parametrize("field", BlockTensors._fields)
    def test_a_replaced_tensor_is_noticed(self, field: str) -> None:
        tensors, x = make_block(conv_bias=True), image()
        run(x, tensors)
        assert_fresh(x, tensors._replace(**{field: getattr(tensors, field) + 0.25}))
        assert_fresh(x, tensors)

    @pytest.mark.parametrize("field", BlockTensors._fields)
    def test_a_tensor_whose_data_was_swapped_is_noticed(self, field: str) -> None:
        tensors, x = make_block(conv_bias=True), image()
        run(x, tensors)
        tensor = getattr(tensors, field)
        version = tensor._version
        tensor.data = tensor.data + 0.25
        assert tensor._version == version  # the trap: torch does not count this one
        assert_fresh(x, tensors)

    def test_another_eps_is_noticed(self) -> None:
        tensors, x = make_block(), image()
        for eps in (EPS, (0.1, 0.1, 0.1), EPS):
            assert_fresh(x, tensors, eps)

    def test_new_memory_at_an_old_address_is_noticed(self) -> None:
        """A parameter dies, the next has its address and its version: only the storage tells them apart."""
        tensors, x = make_block(), image()
        memory = bytearray(4 * 8 * 24)
        seen = set()
        for scale in (1.0, 2.0):
            weight = torch.frombuffer(memory, dtype=torch.float32).view(8, 24, 1, 1)
            torch.frombuffer(memory, dtype=torch.float32).fill_(scale)
            seen.add((weight.data_ptr(), weight._version))
            assert_fresh(x, tensors._replace(project_weight=weight))
            del weight
        assert len(seen) == 1

    def test_views_of_the_same_memory_are_told_apart(self) -> None:
        tensors, x = make_block(8, 8, 8, norm=False), image()
        weight = tensors.project_weight
        for view in (weight, weight.transpose(0, 1), weight):
            assert_fresh(x, tensors._replace(project_weight=view))
        assert len(memo) == 1

    def test_optimizer_step_load_state_dict_and_in_place_edits(self) -> None:
        tensors, x = make_block(requires_grad=True), image()
        parameters = [t for t in tensors if t is not None and t.requires_grad]
        assert_fresh(x, tensors)
        for optimizer in (torch.optim.SGD(parameters, 0.1), torch.optim.AdamW(parameters, 0.1)):
            run_block(x, tensors, EPS, CONFIG).square().sum().backward()
            optimizer.step()
            assert_fresh(x, tensors)
        module = nn.ParameterList(parameters)
        state = {key: value + 0.1 for key, value in module.state_dict().items()}
        module.load_state_dict(state)
        assert_fresh(x, tensors)
        with torch.no_grad():
            nn.init.normal_(tensors.project_weight, std=0.1)
        assert_fresh(x, tensors)

    def test_batchnorm_in_training_needs_forget(self) -> None:
        """The trap this module's docstring names: torch does not count that update."""
        tensors, x = make_block(), image()
        assert tensors.project_mean is not None
        run(x, tensors)
        version = tensors.project_mean._version
        nn.functional.batch_norm(torch.randn(4, 8, 3, 3) + 5, tensors.project_mean, tensors.project_var, training=True)
        assert tensors.project_mean._version == version, "torch counts it now: memo.forget may be needless"
        memo.forget(tensors)
        assert_fresh(x, tensors)

    def test_the_active_tier(self) -> None:
        tensors, x = make_block(), image()
        tiers = [tier["name"] for tier in _C.tiers() if tier["runnable"]]
        for name in [*tiers, *reversed(tiers)]:
            _C.set_max_isa(name)
            _C.reset_counters()
            assert_fresh(x, tensors)
            assert memo.last_run(tensors) == Run("cpu", name)
            assert _C.counters()[name] == 1
        assert len(memo) == 1

    def test_last_run(self) -> None:
        tensors = make_block()
        assert memo.last_run(tensors) is None
        run(image(), tensors)
        assert memo.last_run(tensors) == Run("cpu", _C.active_tier())
        set_backend("reference")
        run(image(), tensors)
        assert memo.last_run(tensors) == Run("reference")
        set_backend("auto")
        run(image(), tensors)
        assert memo.last_run(tensors) == Run("cpu", _C.active_tier())
        memo.forget(tensors)
        assert memo.last_run(tensors) is None

    def test_x_of_every_dtype_shares_one_packing(self) -> None:
        """One for each tier that runs some of them."""
        tensors, dtypes, tiers = make_block(), (torch.float32, torch.bfloat16, torch.float16), []
        own = backends._PACK
        try:
            backends._PACK = lambda *given: tiers.append(given[-1]) or own(*given)
            for dtype in 2 * dtypes:
                run(image().to(dtype), tensors)
        finally:
            backends._PACK = own
        assert tiers == list(dict.fromkeys(map(backends.tier_of, dtypes)))

    def test_gradient_steps_do_not_leave_entries(self) -> None:
        tensors, x = make_block(requires_grad=True), image()
        for _ in range(3):
            run_block(x, tensors, EPS, CONFIG).sum().backward()
            with torch.no_grad():
                tensors.project_weight.add_(0.1)
        assert len(memo) == 1


class TestLifetime:
    def test_packed_weights_die_with_the_first_tensor(self) -> None:
        tensors = make_block()
        run(image(), tensors)
        (record,) = memo._records.values()
        (packed,) = (weakref.ref(value[0]) for value in record.values.values())
        del record
        assert packed() is not None
        tensors = tensors._replace(project_gamma=None, project_beta=None)
        assert packed() is None
        assert len(memo) == 0

    def test_a_deleted_model_frees_its_packed_weights(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tensors = with_grad(make_block())
                self.weights = nn.ParameterList([nn.Parameter(t) for t in self.tensors if t is not None])

        model = Model()
        run(image(), model.tensors)
        another = copy.deepcopy(model.tensors)
        run(image(), another)
        assert len(memo) == 2
        del model
        gc.collect()
        assert len(memo) == 1
        del another
        gc.collect()
        assert len(memo) == 0

    def test_only_the_memory_counts_not_the_python_object(self) -> None:
        tensors, x = make_block(), image()
        run(x, tensors)
        views = BlockTensors(*(None if t is None else t.detach() for t in tensors))
        del tensors
        gc.collect()
        assert len(memo) == 1
        build = Counted()
        memo.get(views, EPS, next(iter(next(iter(memo._records.values())).values)), build)
        assert build.calls == 0

    def test_weights_made_anew_in_every_call_leave_nothing(self) -> None:
        """Parametrized weights, functional calls with weights computed on the fly."""
        tensors, x = make_block(), image()
        for scale in (1.0, 2.0, 3.0):
            assert_fresh(x, tensors._replace(expand_weight=tensors.expand_weight * scale))
            assert len(memo) == 0

    def test_clear(self) -> None:
        run(image(), make_block_kept := make_block())
        assert len(memo) == 1
        memo.clear()
        assert len(memo) == 0
        assert_fresh(image(), make_block_kept)

    def test_round_trips_move_nothing_along(self) -> None:
        tensors, x = make_block(), image()
        run(x, tensors)
        twin = copy.deepcopy(tensors)
        buffer = io.BytesIO()
        torch.save(tensors._asdict(), buffer)
        buffer.seek(0)
        loaded = BlockTensors(**torch.load(buffer))
        for other in (twin, loaded):
            assert other.project_gamma is not None
            other.project_gamma.mul_(2)
            assert_fresh(x, other)
        assert_fresh(x, tensors)


class TestInferenceTensors:
    def test_folds_every_call_and_warns_once(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memo, "_warned_inference", False)
        with torch.inference_mode():
            tensors = make_block()
        x = image()
        with caplog.at_level(logging.WARNING, "mbv2_kernels"):
            for _ in range(3):
                with torch.inference_mode():
                    assert (
                        relative_error(
                            run_block(x, tensors, EPS, CONFIG),
                            unfused(x.double(), BlockTensors(*double(tensors)), EPS, CONFIG),
                        )
                        < 2e-6
                    )
                    assert tensors.project_weight.is_inference()
                    tensors.project_weight.mul_(2)
        assert [r.name for r in caplog.records] == ["mbv2_kernels"]
        assert "inference_mode" in caplog.text
        assert memo.last_run(tensors) == Run("cpu", _C.active_tier())
        assert next(iter(memo._records.values())).values == {}

    def test_ordinary_tensors_in_inference_mode_are_kept(self) -> None:
        tensors, x, build = make_block(), image(), Counted()
        with torch.inference_mode():
            y = run_block(x, tensors, EPS, CONFIG)
        assert run(x, tensors).equal(y)  # what was packed in inference mode serves outside
        what = next(iter(memo._records.values())).last_run
        memo.get(tensors, EPS, what, build)
        assert build.calls == 0


def test_threads_share_one_packing() -> None:
    own, tensors, build = Memo(), make_block(), Counted()
    start, values = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        values.extend(own.get(tensors, EPS, Run("cpu"), build) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1
    assert all(value is values[0] for value in values) and len(values) == 160


def test_threads_that_edit_and_run_different_blocks() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            tensors, x = make_block(), image()
            for _ in range(10):
                tensors.depthwise_weight.mul_(0.9)
                assert_fresh(x, tensors)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
