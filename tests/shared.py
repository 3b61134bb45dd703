"""Where the real logs and reference values lie, for tests that need them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("AIVO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
needs_logs = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real interaction logs are not beside the checkout")
needs_vectors = pytest.mark.skipif(not (SHARED / "vectors").is_dir(), reason="the reference values are not beside the checkout")
