"""The child's side of ``harness.in_child``: ``python -m benchmarks._child module:function ARGUMENTS ANSWER``."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.harness import peak_rss_mb, resident_mb, rounded


def main() -> None:
    target, arguments, answer = sys.argv[1:]
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    base = resident_mb()
    result = function(**json.loads(arguments))
    told = {"result": result, "base_rss_mb": rounded(base), "peak_rss_mb": rounded(peak_rss_mb())}
    Path(answer).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
