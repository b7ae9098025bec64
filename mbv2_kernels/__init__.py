"""MobileNetV2-like blocks as one fused kernel, for PyTorch.

>>> import mbv2_kernels as mbv2, torchvision
>>> model = mbv2.fuse(torchvision.models.mobilenet_v2().eval())
>>> print(mbv2.summary(model))
"""

from __future__ import annotations

import torch  # noqa: F401  (first: the extension needs torch's libraries)

from ._version import __version__

try:
    from . import _C  # noqa: F401  (defines the C++ ops)
except ImportError as error:
    raise ImportError(
        f"the compiled part of mbv2_kernels cannot be loaded: {error}. From a checkout, build it with "
        "`pip install .` (or `python setup.py build_ext --inplace`); if it is built, it may be for another Python, or "
        "this torch may be older than 2.11"
    ) from error

from . import _registrations, _training_registrations, models, reference  # noqa: F401
from .backends import get_fp16_accumulation, set_fp16_accumulation
from .functional import InvertedResidualFunction, inverted_residual, set_backend
from .modules import FusedInvertedResidual
from .patch import FusionReport, FusionRow, fuse, summary, unfuse
from .status import Status, status

__all__ = [
    "FusedInvertedResidual",
    "FusionReport",
    "FusionRow",
    "InvertedResidualFunction",
    "Status",
    "__version__",
    "fuse",
    "get_fp16_accumulation",
    "inverted_residual",
    "models",
    "reference",
    "set_backend",
    "set_fp16_accumulation",
    "status",
    "summary",
    "unfuse",
]
