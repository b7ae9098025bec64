"""A pytest plugin that runs tests/test_gpu.py on CPU tensors (the C++ kernels, Triton's interpreter): it shows slips in
the tests' own Python before a GPU does. What needs a real device fails; test_gpu_script.py picks the tests that do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import mbv2_kernels


def _on_cpu(value: Any) -> Any:
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


class CpuForCuda(TorchFunctionMode):
    """device="cuda" means the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(_on_cpu, args), **kwargs)


def pytest_configure(config: pytest.Config) -> None:
    torch.cuda.is_available = lambda: True  # type: ignore[method-assign]
    Tensor.cuda = lambda self, *args: self  # type: ignore[method-assign]
    nn.Module.cuda = lambda self, *args: self  # type: ignore[method-assign]
    mbv2_kernels.set_backend = lambda name: None  # type: ignore[assignment]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with CpuForCuda():
        yield
