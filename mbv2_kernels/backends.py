"""Which backend runs a block, and running it: the one place that knows all of them.

    "cpu"        CPU tensors, float32, bfloat16, float16: the C++ kernels on weights packed for the tier that runs such
                 tensors now (`tier_of`)
    "triton"     CUDA tensors (CPU tensors under TRITON_INTERPRET=1), the same dtypes: one Triton launch. "auto" uses
                 it only on GPUs of an architecture on which it was checked (triton/configs.py: CHECKED)
    "reference"  anything else, in plain PyTorch operations; also on request

Nothing is skipped in silence: what runs is recorded (`memo.last_run`, shown by `summary`), and where no kernel can take
a model's block, one warning for each reason goes to the logger `mbv2_kernels`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C, reference, training_reference
from .fold import BlockTensors, Eps, FoldedWeights, Layer, Run, fold, fold_layer, memo
from .triton import configs

BACKENDS = ("auto", "cpu", "triton", "reference")

#: What the kernels take and give. They compute in float32 in between, with two exceptions, both in inference on CPUs:
#: with `set_fp16_accumulation(True)` float16 is computed in float16; and with AMX the factors of bfloat16's 1x1
#: convolutions are bfloat16 and their sums float32: weights, BatchNorm folded into them, are rounded, and so is what
#: expand and depthwise give, as it is between unfused layers.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_PACK = torch.ops.mbv2.pack_inverted_residual.default
_RUN_PACKED = torch.ops.mbv2.inverted_residual_packed.default
_PACK_LAYER = torch.ops.mbv2.pack_conv.default
_RUN_PACKED_LAYER = torch.ops.mbv2.conv_act_packed.default

#: The phases of a training step, see `training_reference`.
PHASES = (
    "train_gram",
    "train_depthwise",
    "train_project",
    "train_finish",
    "train_finish_backward",
    "train_project_backward",
    "train_depthwise_backward",
    "train_input_backward",
)
#: Those of the dense layers around the blocks, beside `train_finish` and its backward.
LAYER_PHASES = (
    "train_pointwise",
    "train_pointwise_backward",
    "train_window_gram",
    "train_window_backward",
)
#: The arithmetic between them.
BETWEEN_PHASES = (
    "train_statistics",
    "train_linear_statistics",
    "train_norm",
    "train_fold_expand",
    "train_norm_backward",
    "train_linear_sums",
    "train_expand_backward",
)
_PHASE_OPS = SimpleNamespace(
    **{name: getattr(torch.ops.mbv2, name).default for name in PHASES + LAYER_PHASES + BETWEEN_PHASES},
    train_window=torch.ops.mbv2.conv_act.default,
    # all phases of a block in one call
    train_block_forward=torch.ops.mbv2.train_block_forward.default,
    train_block_gradients=torch.ops.mbv2.train_block_gradients.default,
)

_logger = logging.getLogger("mbv2_kernels")
_backend = "auto"
_fp16_accumulation = False
_warned: set[str] = set()
_REFERENCE = Run("reference")

UNCHECKED = "the Triton kernels have not been checked on such a GPU"  # how the reason of `unchecked_gpu` begins


class BlockConfig(NamedTuple):
    """What a block is apart from its tensors, in the order of the ops. `padding` -1 is "same"; names, never None."""

    stride: int
    padding: int
    dilation: int
    activation: str
    final_activation: str
    residual: bool


class LayerConfig(NamedTuple):
    """What a dense convolution with its activation is apart from its tensors, in the order of the ops."""

    stride: int
    padding: int
    activation: str


def set_backend(name: str) -> None:
    """Chooses what runs fused blocks in this process: "auto" (the default), "cpu", "triton" or "reference".

    For tests and bug reports. Takes effect at the next call, of compiled code too. "auto" is C++ for CPU tensors, and
    for CUDA tensors Triton, if its kernels were checked on a GPU of that architecture: else the original modules run,
    with a warning, and "triton" is the way to try it. A tensor that the chosen backend cannot take raises when it
    comes; float64 always runs the reference. Raises ValueError for another name.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    _backend = name
    memo.epoch = object()  # so that what was planned is asked anew


def get_backend() -> str:
    """The name last given to `set_backend`."""
    return _backend


def set_fp16_accumulation(allowed: bool) -> None:
    """Lets the CPU kernels multiply and add float16 tensors in float16, in inference: off by default.

    CPUs with AVX512-FP16 do that at twice the rate of float32, and less exactly: `mbv2-kernels verify --dtype float16
    --fp16-accumulation` shows how much. A sum beyond 65504 becomes infinite (ReLU6 bounds what is added up, ReLU does
    not), and weights, with BatchNorm folded into them, must not be larger: such a block raises RuntimeError.

    Applies to the forward of blocks, stems and heads in eval mode on float16 CPU tensors (under autocast too), from the
    next call on, of compiled code too. All else computes as before, in float32: other dtypes, training mode, every
    backward, `InvertedResidualFunction`, mean and classifier. What was packed for the other arithmetic is kept, so that
    changing to and fro costs nothing.

    Raises RuntimeError where the CPU, the compiler at build time or MBV2_MAX_ISA does not offer it.
    """
    global _fp16_accumulation
    if not isinstance(allowed, bool):
        raise TypeError(f"allowed must be a bool, got {allowed!r}")
    if allowed and (reason := fp16_accumulation_missing()):
        raise RuntimeError(f"fp16 accumulation cannot run here: {reason}")
    _fp16_accumulation = allowed


def get_fp16_accumulation() -> bool:
    """What was last given to `set_fp16_accumulation`."""
    return _fp16_accumulation


def fp16_accumulation_missing() -> str | None:
    """Why float16 tensors cannot be added up in float16 here, or None."""
    wide = [tier["name"] for tier in _C.tiers() if "avx512f" in tier["features"]]
    return _missing(_C.fp16_tier(), (None, _C.bf16_tier()["name"], *wide))


def bf16_tier_missing() -> str | None:
    """Why the tier for bfloat16 does not run bfloat16 tensors in inference here, or None."""
    return _missing(_C.bf16_tier(), (None, _C.bf16_tier()["name"]))


def _missing(tier: _C.Tier, caps: Sequence[str | None]) -> str | None:
    """Why `tier` cannot run under a cap that is none of `caps`, or None."""
    if not tier["runnable"]:
        return f"tier {tier['name']}: {tier['reason']}"
    if (cap := _C.max_isa()) not in caps:
        return f"tier {tier['name']}: the tiers are held to {cap} at most (MBV2_MAX_ISA)"
    return None


def tier_of(dtype: torch.dtype) -> str:
    """The tier whose kernels run CPU images of `dtype` now, in inference."""
    if dtype is torch.bfloat16:
        return _C.active_bf16_tier()
    if dtype is torch.float16 and _fp16_accumulation:
        return _FP16_TIER
    return _C.active_tier()


def run_block(x: Tensor, tensors: BlockTensors, eps: Eps, config: BlockConfig) -> Tensor:
    """Runs the block, without gradients: the kernel of the op `mbv2::inverted_residual_bn`.

    x [N, Cin, H, W]; returns [N, Cout, Ho, Wo] in x's dtype, channels_last.
    """
    weight = tensors.depthwise_weight
    if weight.dtype is not x.dtype or weight.device != x.device:
        _check_weights(x, weight)
    if x.is_cpu and (_backend == "auto" or _backend == "cpu") and x.dtype in KERNEL_DTYPES:
        return _RUN_PACKED(x, *packed_block(tensors, eps, x.dtype), *config)
    triton = _select_triton(x, tensors)
    if triton is not None:
        run = Run("triton", None, x.dtype)
        weights = memo.get(tensors, eps, run, lambda folded: triton.prepare_weights(x.dtype, *folded))
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            memo.keep(tensors, weights)  # the graph will read them at every replay
        y, kernel, reason = triton.run(x, *weights, *config)
        memo.note(tensors, run._replace(tier=kernel, reason=reason))
        return y
    memo.note(tensors, _REFERENCE)
    weights = fold(tensors, eps)  # anew in every call: gradcheck edits its inputs in ways no memo can notice
    y = reference.inverted_residual(x, *weights, **config._asdict())
    return dense(y, torch.channels_last)


def run_layer(x: Tensor, layer: Layer, eps: float, config: LayerConfig) -> Tensor:
    """Runs a dense convolution with its BatchNorm and activation: the kernel of the op `mbv2::conv_bn_act`.

    x [N, Cin, H, W]; returns [N, Cout, Ho, Wo] in x's dtype, channels_last. There is a kernel for CPUs only.
    """
    if layer.weight.dtype is not x.dtype or layer.weight.device != x.device:
        _check_weights(x, layer.weight)
    if x.is_cpu and (_backend == "auto" or _backend == "cpu") and x.dtype in KERNEL_DTYPES:
        return _RUN_PACKED_LAYER(x, *packed_layer(layer, eps, x.dtype), *config)
    memo.note(layer, _REFERENCE)
    y = reference.conv_act(x, *fold_layer(layer, eps), **config._asdict())
    return dense(y, torch.channels_last)


def packed_block(tensors: BlockTensors, eps: Eps, dtype: torch.dtype) -> tuple[Any, ...]:
    """The packed weights that `run_block` would use now for x of `dtype` on the CPU, with the numbers the op takes
    beside them."""
    tier = _TIERS[tier_of(dtype)]
    return memo.get(tensors, eps, tier.run, tier.pack)


def packed_layer(layer: Layer, eps: float, dtype: torch.dtype) -> tuple[Any, ...]:
    """The same for `run_layer`."""
    tier = _TIERS[tier_of(dtype)]
    return memo.get(layer, eps, tier.run, tier.pack_layer)


def train_phases(x: Tensor, tensors: BlockTensors) -> Any:
    """What computes a training step on x, phases and between them: functions named as in `training_reference`."""
    phases, run = _select_phases(x)
    memo.note(tensors, run)
    return phases


def train_layer_phases(x: Tensor, layer: Layer) -> Any:
    """The same for a dense convolution, for which there are kernels on CPUs only."""
    phases, run = _select_phases(x)
    if run.backend == "triton":
        phases, run = training_reference, _REFERENCE
    memo.note(layer, run)
    return phases


def trains_with_kernels(x: Tensor) -> bool:
    """Whether kernels compute the phases for x; else a backward in plain operations is as good and simpler."""
    return _select_phases(x)[0] is not training_reference


def training_refused(x: Tensor) -> str | None:
    """Why blocks on x's device train in their original modules, or None."""
    if x.is_cuda and _backend == "auto":
        return 'no GPU has checked the Triton kernels for training yet: set_backend("triton") runs them'
    return None


def _select_phases(x: Tensor) -> tuple[Any, Run]:
    if x.dtype in KERNEL_DTYPES:
        if x.is_cpu and (_backend == "auto" or _backend == "cpu"):
            return _PHASE_OPS, _TIERS[_C.active_tier()].run
        if _backend == "cpu":
            raise RuntimeError(f'set_backend("cpu") is in force, but x is on {x.device}')
        if _backend == "triton":
            phases, reason = _triton_phases()
            if phases is None:
                raise RuntimeError(f'set_backend("triton") is in force, but Triton cannot train: {reason}')
            return phases, Run("triton", None, x.dtype)
    return training_reference, _REFERENCE


def run_triton_phase(name: str, *args: object) -> Any:
    """The op `mbv2::<name>`, a phase of a training step, on CUDA tensors."""
    phases, reason = _triton_phases()
    if phases is None:
        raise RuntimeError(f"mbv2::{name} on CUDA needs Triton: {reason}")
    return getattr(phases, name)(*args)


def inverted_residual_triton(x: Tensor, *args: object) -> Tensor:
    """The op `mbv2::inverted_residual` on CUDA tensors."""
    if _backend == "auto" and unchecked_gpu(x.device) is not None:
        y = reference.inverted_residual(x, *args[:6], **BlockConfig(*args[6:])._asdict())  # type: ignore[arg-type]
        return dense(y, torch.channels_last)
    ops, reason = _triton_ops()
    if ops is None:
        raise RuntimeError(f"mbv2::inverted_residual on {x.device} needs Triton: {reason}")
    return ops.inverted_residual(x, *args)


def unchecked_gpu(device: torch.device) -> str | None:
    """Why "auto" does not run the Triton kernels on this CUDA device (and warns, once); None if it does."""
    capability = _capability(device)
    if capability in configs.CHECKED:
        return None
    reason = f'{UNCHECKED} (compute capability {capability / 10}): set_backend("triton") runs them all the same'
    _warn_once(f"fused blocks run unfused: {reason}")
    return reason


# What torch.compiler.assume_constant_result sets (that imports half of torch.compile, and Triton): tracing takes the
# answer as it is, and the warning is given then.
unchecked_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def dense(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`tensor` with exactly the strides `torch.empty` gives, also in dimensions of size 1: what the fakes promise."""
    y = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)
    return tensor if tensor.stride() == y.stride() else y.copy_(tensor)


class _Tier:
    """A tier of the CPU kernels: `run` names it to the memo, the others pack folded weights for it."""

    def __init__(self, name: str) -> None:
        self.run = Run("cpu", name)
        self._name = name

    def pack(self, folded: FoldedWeights) -> tuple[Tensor, int, int, int, bool]:
        """The packed weights, and what the op takes beside them: hidden and output channels, kernel size, expand."""
        hidden_channels, _, _, kernel_size = folded.w_depthwise.shape
        out_channels = folded.w_project.shape[0]
        return _PACK(*folded, self._name), hidden_channels, out_channels, kernel_size, folded.w_expand is not None

    def pack_layer(self, folded: tuple[Tensor, Tensor | None]) -> tuple[Tensor, int, int]:
        """The packed weights, output channels, kernel size."""
        out_channels, _, _, kernel_size = folded[0].shape
        return _PACK_LAYER(*folded, self._name), out_channels, kernel_size


_TIERS = {tier["name"]: _Tier(tier["name"]) for tier in _C.all_tiers()}
_FP16_TIER = _C.fp16_tier()["name"]


def _check_weights(x: Tensor, weight: Tensor) -> None:
    """Raises if conv2d would have to, but for float32 weights below a 16-bit x."""
    if weight.dtype != x.dtype and (weight.dtype != torch.float32 or x.dtype not in KERNEL_DTYPES):
        raise TypeError(f"weights must be {x.dtype} like x, or float32 below a 16-bit x; they are {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"x is on {x.device}, but the weights on {weight.device}")


def _select_triton(x: Tensor, tensors: BlockTensors) -> ModuleType | None:
    """Triton's ops, or None for the reference. (`run_block` has taken the CPU kernels' case.)"""
    if _backend == "reference":
        return None
    if x.dtype not in KERNEL_DTYPES:
        if tensors.project_mean is not None:  # a model's block; of the functional form it is documented
            _warn_once(f"fused blocks in {x.dtype} run in plain PyTorch operations: the kernels compute in float32")
        return None
    if _backend == "cpu":
        raise RuntimeError(f'set_backend("cpu") is in force, but x is on {x.device}')
    if x.is_cuda and _backend == "auto" and unchecked_gpu(x.device) is not None:
        return None
    if x.is_cuda or (x.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"):
        ops, reason = _triton_ops()
        if ops is not None:
            return ops
    elif x.is_cpu:
        reason = "it takes CPU tensors only in its interpreter (TRITON_INTERPRET=1 before triton is imported)"
    else:
        reason = f"x is on {x.device}, it takes CUDA tensors"
    if _backend == "triton":
        raise RuntimeError(f'set_backend("triton") is in force, but Triton cannot run: {reason}')
    _warn_once(f"fused blocks on {x.device.type} run in plain PyTorch operations: no Triton: {reason}")
    return None


@functools.cache
def _triton_ops() -> tuple[ModuleType | None, str]:
    """The Triton backend, imported when first needed, and the reason if it cannot run."""
    try:
        from .triton import ops
    except Exception as error:  # whatever a broken Triton raises is the reason to report
        return None, f"Triton cannot be imported: {type(error).__name__}: {error}"
    available, reason = ops.available()
    return (ops, "") if available else (None, reason)


@functools.cache
def _triton_phases() -> tuple[SimpleNamespace | None, str]:
    """The Triton kernels for training, and the reason if they cannot run. Between them torch's operations are few and
    small enough for a GPU."""
    ops, reason = _triton_ops()
    if ops is None:
        return None, reason
    try:
        phases = importlib.import_module(".triton.training_ops", __package__)
    except ImportError as error:
        return None, str(error)
    between = {name: getattr(training_reference, name) for name in BETWEEN_PHASES}
    return SimpleNamespace(**{name: getattr(phases, name) for name in PHASES}, **between), ""


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _logger.warning(message)
