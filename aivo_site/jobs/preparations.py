"""What a queue's workers need on their machine before they start; each is a program of its own, run to its end.

Nothing of it stays in memory, and workers start also where it fails: it makes work faster, it is no condition of it.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass

from aivo_site.environment import BASE_DIR

logger = logging.getLogger(__name__)

_LONGEST_SECONDS = 300.0
_OUTPUT_KEPT = 2_000


@dataclass(frozen=True)
class Preparation:
    """A module to run once before the workers of ``queue`` start; running it again must be cheap and change nothing."""

    queue: str
    module: str


_PREPARATIONS: dict[str, Preparation] = {}


def register_preparation(preparation: Preparation) -> None:
    """Make a preparation known; registering the same one again changes nothing."""
    _PREPARATIONS[preparation.module] = preparation


def prepare(queue: str) -> bool:
    """Run the preparations of ``queue``, one after the other; False where one failed, which the log explains."""
    outcomes = [_run(found.module) for found in _PREPARATIONS.values() if found.queue == queue]
    return all(outcomes)


def _run(module: str) -> bool:
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", module],
            cwd=BASE_DIR,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_LONGEST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        logger.warning("%s did not end within %d s; workers start without it", module, _LONGEST_SECONDS)
        return False
    output = done.stdout.decode("utf-8", errors="replace")[-_OUTPUT_KEPT:].strip()
    if done.returncode != 0:
        logger.warning("%s ended with %d; workers start without it: %s", module, done.returncode, output)
        return False
    logger.info("%s: %s", module, output)
    return True
