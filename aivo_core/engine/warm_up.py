"""Compiles the engine for this machine, so that no training waits for it: ``python -m aivo_core.engine.warm_up``.

Costs seconds the first time and less than one after that. Without a compiler the engine computes with NumPy, and this says so.
"""

from __future__ import annotations

import sys

from aivo_core.engine.cohort import CohortEngine


def main() -> None:
    engine = CohortEngine()
    backend = engine.warm_up()
    note = f" ({engine.note})" if engine.note else ""
    sys.stdout.write(f"engine cohort trains with {backend}{note}\n")


if __name__ == "__main__":
    main()
