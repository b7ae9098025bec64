"""A fused block or layer with BatchNorms in training mode: what nn.BatchNorm2d does around the arithmetic.

Which layers use batch statistics, over which processes, torch's error for a single value a channel, and the running
statistics. The arithmetic itself is the op `mbv2::train_block`, or `mbv2::train_layer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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
    biases = tensors.expand_bias, tensors.depthwise_bias, tensors.project_bias
    _update_running_statistics(
        x.shape[0] == 0,
        [
            _Running(*row)
            for used, *row in zip(batch, norms, biases, groups, statistics, strict=False)
            if used and row[0].track_running_stats
        ],
    )
    return y


def train_layer(x: Tensor, layer: ConvNorm, tensors: Layer, eps: float, config: LayerConfig) -> Tensor:
    """The same for a dense convolution whose BatchNorm is in training mode."""
    group = sync_group(layer.norm)
    channels, kernel_size = tensors.weight.shape[0], tensors.weight.shape[-1]
    size = [reference.output_size(size, kernel_size, config.stride, config.padding, 1) for size in x.shape[2:]]
    _check_values_per_channel(x, channels, size, group)
    run = _apply(TrainLayerFunction, torch.ops.mbv2.train_layer, x)
    y, _, statistics, *_ = run(x, *tensors[:4], eps, *config, group)
    norm: Any = layer.norm
    if norm.track_running_stats:
        _update_running_statistics(x.shape[0] == 0, [_Running(norm, tensors.bias, group, statistics)])
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


class _Running(NamedTuple):
    """A BatchNorm that keeps running statistics, and what it takes to update them."""

    norm: Any
    conv_bias: Tensor | None
    group: str
    statistics: Tensor


def _update_running_statistics(empty: bool, norms: Sequence[_Running]) -> None:
    """As nn.BatchNorm2d: unbiased variance, momentum, or the cumulative average where momentum is None.

    An empty batch only counts, where no process has more.
    """
    if not norms:
        return
    with torch.no_grad():
        if not empty and all(is_plain(row.statistics) for row in norms) and _updated_in_one_op(norms):
            return
        for norm, conv_bias, group, statistics in norms:
            norm.num_batches_tracked.add_(1)
            if empty and not group:
                continue
            mean, var, pixels = statistics.unbind()
            if conv_bias is not None:
                mean = mean + conv_bias
            var = var * (pixels / (pixels - 1))
            factor = norm.momentum
            for own, new in ((norm.running_mean, mean), (norm.running_var, var)):
                if factor is None:
                    factor = norm.num_batches_tracked.double().reciprocal()
                own.lerp_(new.to(own.dtype), factor if isinstance(factor, float) else factor.to(own.dtype))


def _updated_in_one_op(norms: Sequence[_Running]) -> bool:
    """False, and nothing has changed, where a tensor is not one that the op takes."""
    own = [norm._buffers for norm, *_ in norms]  # an attribute of a module that is none of the instance costs a call
    means, variances = [b["running_mean"] for b in own], [b["running_var"] for b in own]
    counts = [b["num_batches_tracked"] for b in own]
    momenta = [math.nan if norm.momentum is None else norm.momentum for norm, *_ in norms]
    if not _UPDATE(
        [row.statistics for row in norms], [row.conv_bias for row in norms], means, variances, counts, momenta
    ):
        return False
    torch.autograd.graph.increment_version([*means, *variances, *counts])  # which only the dispatcher's own ops do
    return True
