"""Parameters and multiply-adds of a network, layer by layer, from shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCost:
    """One convolution or linear layer in the order it runs; shapes as it saw them."""

    path: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class ModelCost:
    """`parameters` counts every parameter (BatchNorm's too, each once); `multiply_adds` is the sum over `layers`."""

    parameters: int
    multiply_adds: int
    layers: tuple[LayerCost, ...]

    def __str__(self) -> str:
        width = max((len(layer.path) for layer in self.layers), default=5)
        lines = [f"{'layer':{width}}  {'kind':9}  {'output':>18}  {'parameters':>11}  {'multiply-adds':>13}"]
        for layer in self.layers:
            output = "x".join(map(str, layer.output_shape))
            lines.append(
                f"{layer.path:{width}}  {layer.kind:9}  {output:>18}  {layer.parameters:11,}  {layer.multiply_adds:13,}"
            )
        lines.append(f"{'all':{width}}  {'':9}  {'':18}  {self.parameters:11,}  {self.multiply_adds:13,}")
        return "\n".join(lines)


def _multiply_adds(module: nn.Conv2d | nn.Linear, output: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    return output.numel() * (module.in_channels // module.groups) * module.kernel_size[0] * module.kernel_size[1]


def count(model: nn.Module, input_shape: Sequence[int] = (1, 3, 224, 224)) -> ModelCost:
    """Count what one eval-mode call of `model` on an input of `input_shape` costs; nothing is computed.

    Counted: the multiply-adds of `nn.Conv2d` and `nn.Linear` (outputs times kernel area times input channels of the
    group; 2 FLOP each). Not counted: biases, BatchNorm (folds away), activations, pooling, residual additions. Padded
    pixels count as pixels, as in the papers. A layer that runs twice counts twice. The model itself is not touched: an
    unfused copy on the meta device runs.
    """
    from .. import unfuse

    copied = unfuse(copy.deepcopy(model)).to("meta").eval()
    layers: list[LayerCost] = []

    def listen(path: str, module: nn.Conv2d | nn.Linear) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            layers.append(
                LayerCost(
                    path,
                    type(module).__name__,
                    tuple(inputs[0].shape),
                    tuple(output.shape),
                    sum(p.numel() for p in module.parameters(recurse=False)),
                    _multiply_adds(module, output),
                )
            )

        module.register_forward_hook(hook)

    for path, module in copied.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            listen(path, module)
    dtype = next((p.dtype for p in copied.parameters()), torch.float32)
    with torch.no_grad():
        copied(torch.empty(tuple(input_shape), device="meta", dtype=dtype))
    return ModelCost(
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=sum(layer.multiply_adds for layer in layers),
        layers=tuple(layers),
    )
