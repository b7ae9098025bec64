"""`python -m mbv2_kernels`: the same as `mbv2-kernels`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
