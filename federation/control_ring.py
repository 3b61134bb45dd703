"""The control of personal training: each learner under another learner's model."""

from __future__ import annotations

from aivo_core.network import FloatArray
from federation.serving_decision import LaterPart, ServedEvaluation
from federation.training_report import Control, TrainingReport
from models_store.version_files import LoadedVersion


class ControlRing:
    """Measures each learner's later interactions under the model of the learner before, and the first under the last's.

    One ring goes round each block of learners, so that the figures do not depend on which blocks are trained where. What a
    clone is worth that is not the learner's own: only what the own clone gains beyond it is personal. Holds one
    tail and one learner's activations per base.
    """

    def __init__(self, report: TrainingReport) -> None:
        self._report = report
        self._first: tuple[LaterPart, ServedEvaluation] | None = None
        self._last: FloatArray | None = None
        self._pairs = 0

    def add(self, later: LaterPart, served: FloatArray, evaluation: ServedEvaluation) -> None:
        """The next learner, with what serves them."""
        if self._first is not None and not same_base(self._first[0].base, later.base):
            self.close()
        if self._first is None:
            self._first = (later, evaluation)
        elif self._last is not None:
            self._measure(later, evaluation)
        self._last = served

    def close(self) -> None:
        """Close the ring; a single learner has no other."""
        if self._first is not None and self._last is not None and self._pairs:
            self._measure(*self._first)
        self._first, self._last, self._pairs = None, None, 0

    def _measure(self, later: LaterPart, evaluation: ServedEvaluation) -> None:
        if self._last is None:
            raise AssertionError("there is no other learner's model to measure")
        self._report.controls.append(Control(evaluation.main, later.losses(self._last)))
        self._pairs += 1


def same_base(one: LoadedVersion, other: LoadedVersion) -> bool:
    """Whether two loaded versions have the same weights and freeze list."""
    return (one.version, one.spec) == (other.version, other.spec)
