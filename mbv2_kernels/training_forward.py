"""A fused block or layer with BatchNorms in training mode: what nn.BatchNorm2d does around the arithmetic.

Which layers use batch statistics, over which processes, torch's error for a single value a channel, and the running
statistics. The arithmetic itself is the op `mbv2::train_block`, or `mbv2::train_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import reference
from ._training_registrations import TrainBlockFunction, TrainLayerFunction, is_plain
from .backends import BlockConfig, LayerConfig
from .fold import BlockTensors, Eps, Layer

if TYPE_CHECKING:
    from .recognise import ConvNorm

#: What is kept for backward beside the block's input and its output before the last BatchNorm. "fast": the depthwise
#: convolution's output too; "lean": nothing, at the price of one more sweep.
MEMORY = ("fast", "lean")

_UPDATE = torch.ops.mbv2.train_running_statistics.default
_Tensors = TypeVar("_Tensors", BlockTensors, Layer)


def uses_batch_statistics(norm: nn.Module | None) -> bool:
    """Frozen norms, which are no _BatchNorm, carry a training flag too, but never use batch statistics."""
    return norm is not None and norm.training and hasattr(norm, "track_running_stats")


def train_block(
    x: Tensor, layers: Sequence[ConvNorm | None], tensors: BlockTensors, eps: Eps, config: BlockConfig, memory: str
) -> Tensor:
    """Runs the block with batch statistics where a BatchNorm is in training mode, and updates its running statistics.

    x [N, Cin, H, W]; returns [N, Cout, Ho, Wo] in x's dtype, channels_last. Raises ValueError as torch does for a
    BatchNorm that sees one value a channel.
    """
    norms = [None if layer is None else layer.norm for layer in layers]
    batch = [uses_batch_statistics(norm) for norm in norms]
    groups = [sync_group(norm) if used else "" for norm, used in zip(norms, batch, strict=True)]
    _check_block(x, tensors, config, batch, groups)
    run = _apply(TrainBlockFunction, torch.ops.mbv2.train_block, x)
    y, _, _, *statistics = run(
        x, *without_running_statistics(tensors, batch), eps, *config, batch, groups, memory == "fast"
    )
    for i, norm in enumerate(norms):
        if batch[i]:
            _update_running_statistics(norm, tensors[6 * i + 1], x, groups[i], statistics[i])
    return y


def train_layer(x: Tensor, layer: ConvNorm, tensors: Layer, eps: float, config: LayerConfig) -> Tensor:
    """The same for a dense convolution whose BatchNorm is in training mode."""
    group = sync_group(layer.norm)
    channels, kernel_size = tensors.weight.shape[0], tensors.weight.shape[-1]
    size = [reference.output_size(size, kernel_size, config.stride, config.padding, 1) for size in x.shape[2:]]
    _check_values_per_channel(x, channels, size, group)
    run = _apply(TrainLayerFunction, torch.ops.mbv2.train_layer, x)
    y, _, statistics, *_ = run(x, *tensors[:4], eps, *config, group)
    _update_running_statistics(layer.norm, tensors.bias, x, group, statistics)
    return y


def _apply(function: type[torch.autograd.Function], op: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """What runs a step on x: the Function spares plain eager tensors the dispatcher's way through autograd."""
    return function.apply if is_plain(x) else op


def without_running_statistics(tensors: _Tensors, batch: Sequence[bool]) -> _Tensors:
    """None for the running statistics that the step does not read: autograd would guard them against their update."""
    kept = list(tensors)
    for i, used in enumerate(batch):
        if used:
            kept[6 * i + 4 : 6 * i + 6] = None, None
    return type(tensors)._make(kept)


def sync_group(norm: nn.Module | None) -> str:
    """The name of the process group over which a SyncBatchNorm shares its statistics; "" where there is none."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_available() or not dist.is_initialized():
        return ""
    group: Any = norm.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


def _check_block(
    x: Tensor, tensors: BlockTensors, config: BlockConfig, batch: Sequence[bool], groups: Sequence[str]
) -> None:
    geometry = (tensors.depthwise_weight.shape[-1], config.stride, config.padding, config.dilation)
    before = x.shape[2:]
    after = [reference.output_size(size, *geometry) for size in before]
    out_channels, hidden_channels = tensors.project_weight.shape[:2]
    layers = ((hidden_channels, before), (hidden_channels, after), (out_channels, after))
    for used, group, (channels, size) in zip(batch, groups, layers, strict=True):
        if used:
            _check_values_per_channel(x, channels, size, group)


def _check_values_per_channel(x: Tensor, channels: int, size: Sequence[int], group: str) -> None:
    height, width = size
    if not group and x.shape[0] * height * width == 1:
        shape = torch.Size([1, channels, 1, 1])
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


def _update_running_statistics(norm: Any, conv_bias: Tensor | None, x: Tensor, group: str, statistics: Tensor) -> None:
    """As nn.BatchNorm2d: unbiased variance, momentum, or the cumulative average where momentum is None.

    An empty batch only counts.
    """
    if not norm.track_running_stats:
        return
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        if x.shape[0] == 0 and not group:
            return
        running, factor = (norm.running_mean, norm.running_var), norm.momentum
        read = running if conv_bias is None else (*running, conv_bias)
        if is_plain(statistics) and all(t.is_cpu and t.dtype is torch.float32 and t.is_contiguous() for t in read):
            if factor is None:
                factor = 1 / int(norm.num_batches_tracked)
            _UPDATE(statistics, conv_bias, *running, factor)
            torch.autograd.graph.increment_version(running)  # which only the dispatcher's own ops do
            return
        mean, var, pixels = statistics.unbind()
        if conv_bias is not None:
            mean = mean + conv_bias
        var = var * (pixels / (pixels - 1))
        for own, new in zip(running, (mean, var), strict=True):
            if factor is None:
                factor = norm.num_batches_tracked.double().reciprocal()
            own.lerp_(new.to(own.dtype), factor if isinstance(factor, float) else factor.to(own.dtype))
