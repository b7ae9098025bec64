"""What `import mbv2_kernels` does, and what it says when it cannot."""

from __future__ import annotations

import subprocess
import sys


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_brings_in_nothing_optional() -> None:
    optional = ("triton", "torchvision", "timm", "numpy.testing", "torch._dynamo", "onnxruntime", "openvino", "PIL")
    result = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import mbv2_kernels\n"
        "new = set(sys.modules) - before\n"
        f"print([m for m in {optional!r} if m in new])\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import mbv2_kernels

    assert all(getattr(mbv2_kernels, name, None) is not None for name in mbv2_kernels.__all__)
    assert callable(mbv2_kernels.status)  # the function, not the module of that name


def test_a_missing_extension_is_loud() -> None:
    result = python("import sys; sys.modules['mbv2_kernels._C'] = None; import mbv2_kernels")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the compiled part of mbv2_kernels cannot be loaded: ")
    assert "pip install" in last
