"""Reference networks in plain PyTorch, and the counting of what they cost.

The networks are unfused on purpose: they are what `mbv2_kernels.fuse` is measured against, and what it makes fast.
"""

from __future__ import annotations

from .cost import LayerCost, ModelCost, count
from .mobilenet_v1 import MobileNetV1, mobilenet_v1
from .mobilenet_v2 import MobileNetV2, mobilenet_v2

__all__ = ["LayerCost", "MobileNetV1", "MobileNetV2", "ModelCost", "count", "mobilenet_v1", "mobilenet_v2"]
