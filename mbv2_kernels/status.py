"""Which backends and instruction-set tiers can run on this machine, and for each that cannot, why."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata

import torch


@dataclass(frozen=True)
class TierStatus:
    """One instruction-set tier of the CPU backend. `active`: the one that runs now; besides, the one that multiplies
    bfloat16 where it runs bfloat16 inference, and the one that computes in float16 if `set_fp16_accumulation` is on."""

    name: str
    compiled: bool
    runnable: bool
    active: bool
    reason: str


@dataclass(frozen=True)
class BackendStatus:
    """One backend; `reason` says why it is not available, or what it will run on. `tiers` is fastest first, behind
    them those for 16-bit inference: the one that multiplies bfloat16 and the one that computes in float16."""

    name: str
    available: bool
    reason: str
    tiers: Sequence[TierStatus] = field(default=())


@dataclass(frozen=True)
class Status:
    """What `status()` found. `str()` is a table for people; `threads` is torch's own number, which the kernels obey."""

    backends: Sequence[BackendStatus]
    versions: dict[str, str]
    threads: int

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {version}" for name, version in self.versions.items())]
        lines.append(f"threads: {self.threads} (torch.set_num_threads)")
        for backend in self.backends:
            lines.append(f"{backend.name:10} {'yes' if backend.available else 'no':4} {backend.reason}".rstrip())
            for tier in backend.tiers:
                state = "active" if tier.active else "yes" if tier.runnable else "no"
                lines.append(f"  {tier.name:12} {state:6} {tier.reason}".rstrip())
        return "\n".join(lines)


#: What its name does not say of a tier for float32.
_BF16X3 = "float32 as sums of three bfloat16 numbers, on AMX"


def _cpu() -> BackendStatus:
    from . import _C
    from .backends import bf16_tier_missing, fp16_accumulation_missing, get_fp16_accumulation
    from .shortcut import UNPLANNED

    active = _C.active_tier()
    tiers = tuple(
        TierStatus(
            name=tier["name"],
            compiled=tier["compiled"],
            runnable=tier["runnable"],
            active=tier["name"] == active,
            reason=tier["reason"] or (_BF16X3 if tier["name"] == "avx512bf16x3" else ""),
        )
        for tier in _C.tiers()
    )
    on = get_fp16_accumulation()
    tiers += tuple(
        TierStatus(
            name=tier["name"],
            compiled=tier["compiled"],
            runnable=missing is None,
            active=active,
            reason=missing or purpose,
        )
        for tier, missing, active, purpose in (
            (
                _C.bf16_tier(),
                bf16_tier_missing(),
                _C.active_bf16_tier() == _C.bf16_tier()["name"],
                "for bfloat16 inference",
            ),
            (
                _C.fp16_tier(),
                fp16_accumulation_missing(),
                on,
                f"for float16 inference, {'on' if on else 'off'} (set_fp16_accumulation)",
            ),
        )
    )
    cap = _C.max_isa()
    return BackendStatus(
        name="cpu",
        available=any(tier.runnable for tier in tiers),
        reason=f"C++, tier {active}"
        + (f", held to {cap} at most (MBV2_MAX_ISA)" if cap else "")
        + (f"; every module is called for itself: {UNPLANNED}" if UNPLANNED else ""),
        tiers=tiers,
    )


def cuda_missing() -> str | None:
    """Why no CUDA device can be used, or None."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def _triton(import_triton: bool) -> BackendStatus:
    missing = cuda_missing()
    if importlib.util.find_spec("triton") is None:
        reasons = ["Triton is not installed"] + ([missing] if missing else [])
        return BackendStatus("triton", False, "; ".join(reasons))
    if import_triton:
        try:
            from .triton import ops
        except Exception as error:  # whatever a broken Triton raises is the reason to show
            return BackendStatus("triton", False, f"Triton cannot be imported: {type(error).__name__}: {error}")
        available, reason = ops.available()
        return BackendStatus("triton", available, reason + (_unchecked() if available and not missing else ""))
    if missing:
        return BackendStatus("triton", False, missing)
    return BackendStatus("triton", True, torch.cuda.get_device_name() + _unchecked())


def _unchecked() -> str:
    """What to add about the GPUs that "auto" leaves alone."""
    from .backends import unchecked_gpu

    reasons = (unchecked_gpu(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    return "".join(f'; not used by "auto": {reason}' for reason in dict.fromkeys(reasons) if reason)


def status(*, import_triton: bool = False) -> Status:
    """What can run here: the backends `cpu` (with its instruction-set tiers), `triton` and `reference`.

    Triton is only looked for, not imported, unless `import_triton` is true: importing it takes most of a second and may
    itself fail, which is then the reason given.
    """
    from . import __version__

    versions = {"mbv2_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("triton") is not None:
        try:
            versions["triton"] = metadata.version("triton")
        except metadata.PackageNotFoundError:
            versions["triton"] = "of unknown version"
    return Status(
        backends=(
            _cpu(),
            _triton(import_triton),
            BackendStatus("reference", True, "plain PyTorch operations, any device and dtype"),
        ),
        versions=versions,
        threads=torch.get_num_threads(),
    )


def cpu_model() -> str:
    """The processor's name as the operating system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model", "cpu model"):
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def cores() -> int:
    """The number of processors this process may use (its affinity mask), not the number in the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
