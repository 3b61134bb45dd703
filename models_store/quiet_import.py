"""Loading TensorFlow without its start-up notices on an operator's terminal.

The library writes them from C before any of its log settings apply. Everything else that reaches standard error in the
meantime is written out afterwards, and when loading fails, everything is.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_NOTICE = re.compile(rb"^(WARNING: All log messages before absl|[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ |[IWE]0000 00:00:)")
_STDERR = 2


@contextmanager
def without_start_notices() -> Iterator[None]:
    """Hold back what is written to standard error inside the block, and drop the library's own notices from it."""
    sys.stderr.flush()
    kept = os.dup(_STDERR)
    failed = True
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), _STDERR)
        try:
            yield
            failed = False
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
            held.seek(0)
            for line in held.read().splitlines(keepends=True):
                if failed or not _NOTICE.match(line):
                    os.write(_STDERR, line)
