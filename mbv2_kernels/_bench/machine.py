"""The machine that a figure was measured on: without it, a figure says nothing."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from ..status import cores, cpu_model

# Settings that change what is measured; those that are set go into the record.
ENVIRONMENT = (
    "MBV2_MAX_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "LD_PRELOAD",
)


def fma_peak() -> float:
    """The fused multiply-add peak of one thread in GFLOP/s, in the tier that is active now; takes 0.3 seconds. Of the
    tier that multiplies tiles of bfloat16 parts it is that of AVX-512: no bound for what it can reach."""
    from .. import _C

    return max(_C.fma_peak(_C.active_tier(), 0.1) for _ in range(3))


def machine(threads: int, device: torch.device | None = None) -> dict[str, Any]:
    """CPU, instruction set, cores, threads, versions, measured peak, settings (and the GPU if it is one's turn)."""
    from .. import _C, __version__

    header: dict[str, Any] = {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "isa": _C.active_tier(),
        "features": sorted(name for name, there in _C.cpu_features().items() if there),
        "cores": cores(),
        "threads": threads,
        "fma_peak_gflops_per_thread": round(fma_peak(), 1),
        "mbv2_kernels": __version__,
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
    if device is not None and device.type == "cuda":
        header["gpu"] = torch.cuda.get_device_name(device)
        header["cuda"] = torch.version.cuda
    return header


def describe(header: dict[str, Any]) -> str:
    """The header in two lines for people."""
    lines = [
        f"{header['cpu']}, {header['isa']}, {header['cores']} cores, {header['threads']} thread(s), "
        f"FMA peak {header['fma_peak_gflops_per_thread']:.0f} GFLOP/s a thread",
        f"mbv2_kernels {header['mbv2_kernels']}, torch {header['torch']} ({header['torch_cpu_capability']}), "
        f"Python {header['python']}, {header['system']}",
    ]
    if "gpu" in header:
        measured = (
            f", measured {header['copy_gb_s']:.0f} GB/s copy, {header['matmul_tflop_s']:.1f} TFLOP/s matrix product"
            if "copy_gb_s" in header
            else ""
        )
        lines.append(f"{header['gpu']}, CUDA {header['cuda']}{measured}")
    if header["environment"]:
        lines.append(", ".join(f"{name}={value}" for name, value in header["environment"].items()))
    return "\n".join(lines)
