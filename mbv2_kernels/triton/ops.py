"""The torch side of the Triton kernels: what torch.ops.mbv2.inverted_residual does on CUDA tensors.

backends.py registers it and imports this module with the first CUDA tensor. The op stays opaque to torch.compile and
torch.export (its schema lives in csrc/ops.cpp, its fake in _registrations.py): the compiler sees one call with known
strides and has nothing to trace. torch.library.triton_op would let Inductor inline the launch, but it wants to own the
schema, which the CPU shares, and to trace through the choice of the tile, which reads the batch size.

A launch is safe to capture in a CUDA graph: no autotuning, no synchronisation, workspace from torch's allocator on the
current stream. As with everything in a graph, run once before capturing, so that the kernel is compiled and loaded.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch

from . import configs, gluon_configs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("none", "relu", "relu6")
OLDEST_CAPABILITY = (8, 0)

# FP contraction is what the kernel is written for; Triton 3.10 turns its default off, so it is said here.
LAUNCH_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 when Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and in words where or why not."""
    try:
        import triton
    except Exception as error:
        return False, f"Triton cannot be imported: {error!r}"
    if interpreted():
        return True, f"Triton {triton.__version__}, interpreter (TRITON_INTERPRET): CPU tensors, slow, for tests"
    if torch.version.hip:
        return False, "the kernels are written for NVIDIA GPUs; this torch is built for ROCm"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
    usable = [
        torch.cuda.get_device_name(index)
        for index in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(index) >= OLDEST_CAPABILITY
    ]
    if not usable:
        return False, f"no GPU of compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer (Ampere)"
    first = next(
        i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) >= OLDEST_CAPABILITY
    )
    return True, f"Triton {triton.__version__} on {', '.join(usable)}; {gluon_status(_device(first))}"


@functools.cache
def _device(index: int) -> configs.Device:
    properties = torch.cuda.get_device_properties(index)
    if (properties.major, properties.minor) < OLDEST_CAPABILITY:
        raise RuntimeError(
            f"mbv2_kernels needs compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer, "
            f"{properties.name} has {properties.major}.{properties.minor}"
        )
    return configs.Device(properties.major * 10 + properties.minor, properties.multi_processor_count)


# What plan() is asked for under the interpreter: a device too small to split anything, so that tests choose by hand.
INTERPRETED_DEVICE = configs.Device(capability=80, multiprocessors=1)


def _tf32() -> bool:
    """torch's switch for convolutions, which is what the fused block replaces. The interpreter has no TF32."""
    return not interpreted() and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def prepare_weights(
    dtype: torch.dtype,
    w_expand: torch.Tensor | None,
    b_expand: torch.Tensor | None,
    w_depthwise: torch.Tensor,
    b_depthwise: torch.Tensor | None,
    w_project: torch.Tensor,
    b_project: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """The same six weights, same shapes, as the kernel reads them fastest; it takes any layout and float dtype.

    The two matrices in `dtype`, that of x. Depthwise weights in fp32, [k][k][C] in memory: a thread holds eight
    neighbouring channels and loads them at once. Biases in fp32. Always copies: whoever keeps the result must not keep
    the caller's weights alive with it.
    """

    def copied(t: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        return None if t is None else t.to(dtype, copy=True, memory_format=torch.contiguous_format)

    taps = w_depthwise.permute(2, 3, 1, 0).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return (
        copied(w_expand, dtype),
        copied(b_expand),
        taps.permute(3, 2, 0, 1),
        copied(b_depthwise),
        copied(w_project, dtype),
        copied(b_project),
    )


# Which of the two kernels runs: MBV2_TRITON_KERNEL=gluon or triton, for tests, benchmarks and bug reports. Without it
# the Gluon kernel runs where it was checked (gluon_configs.CHECKED) and covers the case.
KERNEL_VARIABLE = "MBV2_TRITON_KERNEL"
_logger = logging.getLogger("mbv2_kernels")


@functools.cache
def triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def _report(kernel: str, reason: str, level: int) -> None:
    """Once for each reason: which kernel runs and why."""
    _logger.log(level, "blocks run the %s kernel: %s", kernel, reason)


def gluon_status(device: configs.Device) -> str:
    """In words for status(): whether the Gluon kernel runs on this device, and why not."""
    if triton_version() < gluon_configs.OLDEST_TRITON:
        return f"no Gluon kernel: Triton {'.'.join(map(str, triton_version()))} is too old"
    if device.capability not in gluon_configs.SHARED:
        return "no Gluon kernel for this GPU"
    if device.capability in gluon_configs.CHECKED:
        return f"Gluon kernel, checked on {gluon_configs.CHECKED[device.capability]}"
    return f"Gluon kernel not checked on such a GPU, runs with {KERNEL_VARIABLE}=gluon only"


def _choose_gluon(
    problem: configs.Problem, device: configs.Device, pads: gluon_configs.Pads, in_pixels: int, kernel: str | None,
    aligned: bool, **options: Any,
) -> tuple[gluon_configs.Plan | None, str]:  # fmt: skip
    """(the Gluon kernel's plan if it is to run, why). `kernel` is a demand, the environment variable a wish."""
    wish = kernel or os.environ.get(KERNEL_VARIABLE) or None
    _require(
        wish is None or wish in gluon_configs.KERNELS, f"kernel must be one of {gluon_configs.KERNELS}, got {wish!r}"
    )
    plan, reason = gluon_configs.choose(problem, device, triton_version(), pads, in_pixels, wish, **options)
    if plan is not None and not aligned:
        plan, reason = None, "the Gluon kernel cannot: x does not start at a multiple of 16 bytes"
    _require(plan is not None or kernel != "gluon", reason)
    level = logging.WARNING if wish == "gluon" and plan is None else logging.DEBUG
    _report("Triton" if plan is None else "Gluon", reason, level)
    return plan, reason


def _require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"inverted_residual: {message}")


def _same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's "same": (pixels in front, pixels in all)."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total


def _check_weights(
    x: torch.Tensor, w_expand: Any, b_expand: Any, w_depthwise: Any, b_depthwise: Any, w_project: Any, b_project: Any
) -> tuple[int, int, int]:
    """(hidden channels, out channels, kernel size); TypeError or ValueError for what does not fit together."""
    _require(x.dtype in DTYPES, f"x must be float16, bfloat16 or float32, got {x.dtype}", TypeError)
    _require(x.dim() == 4, f"x must be [N, C, H, W], got {x.dim()} dimensions")
    shape = list(w_depthwise.shape)
    _require(
        len(shape) == 4 and shape[1] == 1 and shape[2] == shape[3], f"w_depthwise must be [C, 1, k, k], got {shape}"
    )
    in_channels, hidden, kernel, out = x.shape[1], shape[0], shape[2], w_project.shape[0]
    _require(w_expand is not None or b_expand is None, "b_expand is given without w_expand")
    _require(
        w_expand is not None or in_channels == hidden,
        f"without w_expand x must have w_depthwise's {hidden} channels, got {in_channels}",
    )
    for name, tensor, want in (
        ("w_expand", w_expand, [hidden, in_channels, 1, 1]),
        ("b_expand", b_expand, [hidden]),
        ("w_depthwise", w_depthwise, shape),
        ("b_depthwise", b_depthwise, [hidden]),
        ("w_project", w_project, [out, hidden, 1, 1]),
        ("b_project", b_project, [out]),
    ):
        if tensor is not None:
            _require(
                tensor.dtype in DTYPES, f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}", TypeError
            )
            _require(list(tensor.shape) == want, f"{name} must be {want}, got {list(tensor.shape)}")
            _require(tensor.device == x.device, f"{name} is on {tensor.device}, x on {x.device}")
    return hidden, out, kernel


def inverted_residual(*arguments: Any, **options: Any) -> torch.Tensor:
    """The fused block on a CUDA tensor (or a CPU tensor under TRITON_INTERPRET=1); the contract of the op of that name.

    Arguments as `run` has them.
    """
    return run(*arguments, **options)[0]


def run(
    x: torch.Tensor,
    w_expand: torch.Tensor | None,
    b_expand: torch.Tensor | None,
    w_depthwise: torch.Tensor,
    b_depthwise: torch.Tensor | None,
    w_project: torch.Tensor,
    b_project: torch.Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    activation: str,
    final_activation: str,
    residual: bool,
    *,
    tile: configs.Tile | None = None,
    splits: int | None = None,
    kernel: str | None = None,
    gluon: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, str, str]:
    """`inverted_residual` and what computed it: (y, which of gluon_configs.KERNELS, why that one).

    x [N, Cin, H, W] fp16, bf16 or fp32, any strides; weights in torch's convolution shapes, any float dtype; padding in
    pixels, -1 for "same". y is [N, Cout, Ho, Wo] in x's dtype, dense channels_last. Raises ValueError naming the
    argument. For tests and tuning: `tile` and `splits` override the table of configs.py; `kernel` "gluon" or "triton"
    demands that kernel (ValueError if it cannot), `gluon` has tile, splits and half of gluon_configs.plan.
    """
    hidden, out_channels, size = _check_weights(x, w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project)
    _require(stride >= 1, f"stride must be at least 1, got {stride}")
    _require(dilation >= 1, f"dilation must be at least 1, got {dilation}")
    _require(padding >= -1, f'padding must be at least 0, or -1 for "same", got {padding}')
    _require(activation in ACTIVATIONS, f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    _require(
        final_activation in ACTIVATIONS, f"final_activation must be one of {ACTIVATIONS}, got {final_activation!r}"
    )
    batch, in_channels, height, width = x.shape
    reach = (size - 1) * dilation + 1
    (top, pad_y), (left, pad_x) = ((padding, 2 * padding),) * 2
    if padding == -1:
        (top, pad_y), (left, pad_x) = (_same_padding(side, size, stride, dilation) for side in (height, width))
    out_height, out_width = (height + pad_y - reach) // stride + 1, (width + pad_x - reach) // stride + 1
    _require(
        height + pad_y >= reach and width + pad_x >= reach,
        f"x of {height} x {width} pixels, padded, is smaller than the depthwise kernel's {reach} x {reach}",
    )
    if residual:
        _require(final_activation == "none", f'residual needs final_activation "none", got {final_activation!r}')
        _require(
            (out_channels, out_height, out_width) == (in_channels, height, width) and stride == 1,
            f"residual needs y like x, got x {list(x.shape[1:])} and y {[out_channels, out_height, out_width]}",
        )

    y = torch.empty(
        (batch, out_channels, out_height, out_width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if y.numel() == 0:
        return y, "triton", "nothing to compute"
    if x.is_cuda:
        device = _device(x.device.index)
    else:
        _require(
            interpreted(), f"x is on {x.device}; Triton runs on CUDA tensors (CPU ones only under TRITON_INTERPRET=1)"
        )
        _require(x.dtype != torch.bfloat16, "x is bfloat16, whose tl.dot Triton's interpreter computes wrongly")
        device = INTERPRETED_DEVICE

    tensor_cores = x.dtype != torch.float32 or _tf32()
    problem = configs.Problem(
        batch, out_height, out_width, in_channels, hidden, out_channels, size, stride, dilation,
        w_expand is not None, x.element_size(), tensor_cores,
    )  # fmt: skip
    x = x.contiguous(memory_format=torch.channels_last)
    reason = "asked for" if x.is_cuda else "Triton's interpreter has no Gluon"
    if x.is_cuda and tile is None and splits is None:
        pads = gluon_configs.Pads(top, pad_y - top, left, pad_x - left)
        gluon_plan, reason = _choose_gluon(
            problem, device, pads, height * width, kernel, x.data_ptr() % 16 == 0, **gluon or {}
        )  # fmt: skip
        if gluon_plan is not None:
            weights = w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project
            with torch.cuda.device(x.device):
                _launch_gluon(
                    x, weights, y, gluon_plan, size, stride, top, left, activation, final_activation, residual
                )
            return y, "gluon", reason
    else:
        _require(kernel != "gluon", "the Gluon kernel runs on CUDA tensors, with its own tiles and splits")
    plan = configs.plan(problem, device, height * width, tile, splits)
    taps = w_depthwise.reshape(hidden, size * size)
    w1 = None if w_expand is None else w_expand.reshape(hidden, in_channels).contiguous()
    w2 = w_project.reshape(out_channels, hidden).contiguous()
    b1, b2, b3 = (None if b is None else b.contiguous() for b in (b_expand, b_depthwise, b_project))
    with torch.cuda.device(x.device) if x.is_cuda else torch.no_grad():
        _launch(
            x, w1, b1, taps, b2, w2, b3, y, plan,
            size, stride, dilation, top, left, activation, final_activation, residual, tensor_cores,
        )  # fmt: skip
    return y, "triton", reason


def _launch(
    x: torch.Tensor, w1: Any, b1: Any, taps: torch.Tensor, b2: Any, w2: torch.Tensor, b3: Any, y: torch.Tensor,
    plan: configs.Plan, kernel: int, stride: int, dilation: int, top: int, left: int,
    activation: str, final_activation: str, residual: bool, tensor_cores: bool,
) -> None:  # fmt: skip
    from . import kernels

    tile, splits = plan.tile, plan.splits
    batch, in_channels, height, width = x.shape
    _, out_channels, out_height, out_width = y.shape
    scratch = x.new_empty(plan.scratch_elements) if w1 is not None else None
    partial = x.new_empty(splits * y.numel(), dtype=torch.float32) if splits > 1 else None
    kernels.fused_block[(plan.programs, splits)](
        x, w1, b1, taps, b2, w2, b3, y if partial is None else partial, scratch,
        batch, height, width, out_height, out_width, top, left, plan.tiles, plan.tiles_y, plan.tiles_x,
        taps.stride(0), taps.stride(1),
        CIN=in_channels, C=taps.shape[0], COUT=out_channels, K=kernel, S=stride, D=dilation,
        ACT=activation, FINAL=final_activation, RESIDUAL=residual, PRECISION="tf32" if tensor_cores else "ieee",
        NI=plan.sub_images, TH=plan.tile_height, TW=plan.tile_width, Q=tile.outputs, NP=plan.in_blocks,
        BP=tile.in_block, BK=tile.in_step, CE=tile.chunk, CO_A=plan.columns_a, CO_B=plan.columns_b,
        CO_GROUPS=plan.column_groups, SPLITS=splits, WIDE=plan.wide, num_warps=tile.warps, **LAUNCH_OPTIONS,
    )  # fmt: skip
    if partial is not None:
        _sum_splits(partial, b3, x, y, splits, final_activation, residual)


def _sum_splits(
    partial: torch.Tensor, b3: Any, x: torch.Tensor, y: torch.Tensor, splits: int, final_activation: str, residual: bool
) -> None:
    from . import kernels

    block = 1024
    kernels.sum_splits[(-(-y.numel() // block),)](
        partial, b3, x, y, y.numel(), COUT=y.shape[1], FINAL=final_activation, RESIDUAL=residual, SPLITS=splits,
        BLOCK=block, num_warps=4, **LAUNCH_OPTIONS,
    )  # fmt: skip


def _launch_gluon(
    x: torch.Tensor, weights: tuple[Any, ...], y: torch.Tensor, plan: gluon_configs.Plan,
    kernel: int, stride: int, top: int, left: int, activation: str, final_activation: str, residual: bool,
) -> None:  # fmt: skip
    from . import gluon_kernels

    def whole(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        # what the kernel copies 16 bytes at a time: dense, of the right type, at a multiple of 16 bytes. Prepared
        # weights are all that already.
        t = None if t is None else t.to(dtype).contiguous()
        return t if t is None or t.data_ptr() % 16 == 0 else t.clone()

    w1, b1, taps, b2, w2, b3 = weights
    batch, in_channels, height, width = x.shape
    _, out_channels, out_height, out_width = y.shape
    partial = x.new_empty(plan.splits * y.numel(), dtype=torch.float32) if plan.splits > 1 else None
    b3 = whole(b3, torch.float32)
    whole_parts = plan.lead > 0
    gluon_kernels.fused_block[(plan.programs, plan.splits)](
        x, whole(w1, x.dtype), whole(b1, torch.float32), whole(taps.permute(2, 3, 1, 0), torch.float32),
        whole(b2, torch.float32), whole(w2, x.dtype), b3, y if partial is None else partial,
        batch, height, width, out_height, out_width, 0 if whole_parts else top, 0 if whole_parts else left,
        CIN=in_channels, C=taps.shape[0], COUT=out_channels, K=kernel, S=stride,
        ACT=activation, FINAL=final_activation, RESIDUAL=residual, **plan.constants(), num_warps=plan.tile.warps,
    )  # fmt: skip
    if partial is not None:
        _sum_splits(partial, b3, x, y, plan.splits, final_activation, residual)
