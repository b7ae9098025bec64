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
from .training import Saved, SavedLayer

if TYPE_CHECKING:
    from .recognise import ConvNorm

#: What is kept for backward beside the block's input and its output before the last BatchNorm. "fast": the depthwise
#: convolution's output too, and its input of some blocks; "lean": nothing, at the price of one more sweep.
MEMORY = ("fast", "lean")

_UPDATE = torch.ops.mbv2.train_running_statistics.default
_Tensors = TypeVar("_Tensors", BlockTensors, Layer)


def uses_batch_statistics(norm: nn.Module | None) -> bool:
    """Frozen norms, which are no _BatchNorm, carry a training flag too, but never use batch statistics."""
    return norm is not None and norm.training and hasattr(norm, "track_running_stats")


class _Norm(NamedTuple):
    """A BatchNorm that keeps running statistics, and what it takes to update them."""

    module: Any
    conv_bias: Tensor | None
    group: str
    place: int  # of its statistics, among the outputs of a step


class _Call(NamedTuple):
    """A step of training, apart from its input."""

    arguments: tuple[Any, ...]  # of the op, after x
    norms: list[_Norm]


def _block_call(
    layers: Sequence[ConvNorm | None], tensors: BlockTensors, eps: Eps, config: BlockConfig, memory: str
) -> _Call:
    norms: list[Any] = [None if layer is None else layer.norm for layer in layers]
    batch = [uses_batch_statistics(norm) for norm in norms]
    groups = [sync_group(norm) if used else "" for norm, used in zip(norms, batch, strict=True)]
    biases = tensors.expand_bias, tensors.depthwise_bias, tensors.project_bias
    arguments = (*without_running_statistics(tensors, batch), eps, *config, batch, groups, memory == "fast")
    first = 1 + Saved._fields.index("expand_statistics")
    found = zip(batch, norms, biases, groups, range(first, first + len(norms)), strict=True)
    return _Call(arguments, [_Norm(*row) for used, *row in found if used and row[0].track_running_stats])


def train_block(
    x: Tensor, layers: Sequence[ConvNorm | None], tensors: BlockTensors, eps: Eps, config: BlockConfig, memory: str
) -> Tensor:
    """Runs the block with batch statistics where a BatchNorm is in training mode, and updates its running statistics.

    x [N, Cin, H, W]; returns [N, Cout, Ho, Wo] in x's dtype, channels_last. Raises ValueError as torch does for a
    BatchNorm that sees one value a channel.
    """
    call = _block_call(layers, tensors, eps, config, memory)
    *_, batch, groups, _ = call.arguments
    _check_block(x, tensors, config, batch, groups)
    return _run(TrainBlockFunction, torch.ops.mbv2.train_block, x, call)


def block_again(
    layers: Sequence[ConvNorm | None], tensors: BlockTensors, eps: Eps, config: BlockConfig, memory: str
) -> Again:
    """`train_block`, but for x."""
    return Again(TrainBlockFunction, _block_call(layers, tensors, eps, config, memory))


def _layer_call(layer: ConvNorm, tensors: Layer, eps: float, config: LayerConfig) -> _Call:
    group = sync_group(layer.norm)
    norm: Any = layer.norm
    place = 1 + SavedLayer._fields.index("statistics")
    norms = [_Norm(norm, tensors.bias, group, place)] if norm.track_running_stats else []
    return _Call((*tensors[:4], eps, *config, group), norms)


def train_layer(x: Tensor, layer: ConvNorm, tensors: Layer, eps: float, config: LayerConfig) -> Tensor:
    """The same for a dense convolution whose BatchNorm is in training mode."""
    call = _layer_call(layer, tensors, eps, config)
    channels, kernel_size = tensors.weight.shape[0], tensors.weight.shape[-1]
    size = [reference.output_size(size, kernel_size, config.stride, config.padding, 1) for size in x.shape[2:]]
    _check_values_per_channel(x, channels, size, call.arguments[-1])
    return _run(TrainLayerFunction, torch.ops.mbv2.train_layer, x, call)


def layer_again(layer: ConvNorm, tensors: Layer, eps: float, config: LayerConfig) -> Again:
    """`train_layer`, but for x."""
    return Again(TrainLayerFunction, _layer_call(layer, tensors, eps, config))


def _run(function: type[torch.autograd.Function], op: Callable[..., Any], x: Tensor, call: _Call) -> Tensor:
    # The Function spares plain eager tensors the dispatcher's way through autograd.
    outputs = (function.apply if is_plain(x) else op)(x, *call.arguments)
    _update_running_statistics(x.shape[0] == 0, call.norms, [outputs[norm.place] for norm in call.norms])
    return outputs[0]


class Again:
    """A step as it was, on another x of the same dtype and channels, in as little Python as can be.

    For eager tensors and without process groups; whether all else is as it was is for the caller to know. It holds no
    modules.
    """

    LEAST_IMAGES = 2  # with fewer a BatchNorm may see one value a channel

    def __init__(self, function: type[torch.autograd.Function], call: _Call) -> None:
        self.apply = function.apply
        self.arguments = call.arguments
        self.places = [norm.place for norm in call.norms]
        self.running = _running(call.norms)
        biases, means, variances, *_ = self.running
        floats = [*means, *variances, *(bias for bias in biases if bias is not None)]
        #: Whether the running statistics are of the usual kind.
        self.usual = all(t.dtype is torch.float32 and t.is_contiguous() and t.is_cpu for t in floats)

    def __call__(self, x: Tensor) -> Tensor | None:
        """None if x asks for a closer look, or a running statistic is no longer usual. Then nothing has changed."""
        if x.shape[0] < self.LEAST_IMAGES:
            return None
        outputs: tuple[Tensor, ...] = self.apply(x, *self.arguments)
        if self.places:
            with torch.no_grad():
                if not _updated_in_one_op([outputs[place] for place in self.places], self.running):
                    return None
        return outputs[0]


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


def _update_running_statistics(empty: bool, norms: Sequence[_Norm], statistics: Sequence[Tensor]) -> None:
    """As nn.BatchNorm2d: unbiased variance, momentum, or the cumulative average where momentum is None.

    An empty batch only counts, where no process has more.
    """
    if not norms:
        return
    with torch.no_grad():
        if not empty and all(map(is_plain, statistics)) and _updated_in_one_op(statistics, _running(norms)):
            return
        for (norm, conv_bias, group, _), found in zip(norms, statistics, strict=True):
            norm.num_batches_tracked.add_(1)
            if empty and not group:
                continue
            mean, var, pixels = found.unbind()
            if conv_bias is not None:
                mean = mean + conv_bias
            var = var * (pixels / (pixels - 1))
            factor = norm.momentum
            for own, new in ((norm.running_mean, mean), (norm.running_var, var)):
                if factor is None:
                    factor = norm.num_batches_tracked.double().reciprocal()
                own.lerp_(new.to(own.dtype), factor if isinstance(factor, float) else factor.to(own.dtype))


def _updated_in_one_op(statistics: Sequence[Tensor], running: tuple[list[Any], ...]) -> bool:
    """False, and nothing has changed, where a tensor is not one that the op takes. `running`: see `_running`."""
    if not _UPDATE(statistics, *running):
        return False
    _, means, variances, counts, _ = running
    torch.autograd.graph.increment_version([*means, *variances, *counts])  # which only the dispatcher's own ops do
    return True


def _running(norms: Sequence[_Norm]) -> tuple[list[Any], ...]:
    """What the op that updates running statistics takes after the new ones; it changes the second to the fourth."""
    own = [norm._buffers for norm, *_ in norms]  # an attribute of a module that is none of the instance costs a call
    return (
        [norm.conv_bias for norm in norms],
        [b["running_mean"] for b in own],
        [b["running_var"] for b in own],
        [b["num_batches_tracked"] for b in own],
        [math.nan if norm.momentum is None else norm.momentum for norm, *_ in norms],
    )
