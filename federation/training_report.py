"""What came of training many learners' own models, and how they compare with main."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from django.utils.translation import gettext as _

from federation.errors import NothingToTrain
from federation.serving_decision import ServedEvaluation
from models_store.evaluation import LearnerLosses, paired_change

NOTES = 20
"""Learners of whom a report says more than a count."""

FIGURES = ("total", "content", "path", "score", "content_top1", "content_top5", "path_top1")


@dataclass(frozen=True)
class Control:
    """One learner's later interactions under main and under *another* learner's served model."""

    main: LearnerLosses
    other: LearnerLosses


@dataclass(frozen=True)
class Note:
    """Why one learner was left out or failed, where the reason code alone does not say enough."""

    learner_id: str
    code: str
    message: str


@dataclass
class TrainingReport:
    """What became of the learners.

    Attributes:
        backend: what computed, with its version; several where it changed on the way.
        trained: learners with a new tail. skipped, failed: learners by reason code.
        evaluations: of the trained, and of those with nothing new whose model was measured before.
        controls: what a clone is worth that is not the learner's own.
        choices: by serving choice, over the same learners as ``evaluations`` and those without later interactions.
        seconds: in all. training_seconds: of the engine alone.
        notes: the first ``NOTES`` learners of whom there is more to say than the code.
        stopped: asked to stop before the end; what was trained until then stays.
    """

    engine: str
    backend: str = ""
    trained: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    evaluations: list[ServedEvaluation] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    choices: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    training_seconds: float = 0.0
    notes: list[Note] = field(default_factory=list)
    stopped: bool = False

    def computed_by(self, backend: str) -> None:
        """Note what computed a result: a fast engine may begin on one backend and go on with another."""
        names = [name for name in self.backend.split(", ") if name]
        self.backend = ", ".join(names if backend in names else [*names, backend])

    def leave_out(self, learner_id: str, code: str, message: str = "") -> None:
        """Count a learner who is not trained."""
        self.skipped[code] += 1
        self._note(learner_id, code, message)

    def fail(self, learner_id: str, code: str, message: str = "") -> None:
        """Count a learner whose training failed."""
        self.failed[code] += 1
        self._note(learner_id, code, message)

    def _note(self, learner_id: str, code: str, message: str) -> None:
        if message and len(self.notes) < NOTES:
            self.notes.append(Note(learner_id, code, message))

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the command ``train_learner_models``."""
        return {
            "trained": self.trained,
            "skipped": dict(sorted(self.skipped.items())),
            "failed": dict(sorted(self.failed.items())),
            "engine": self.engine,
            "backend": self.backend,
            "evaluation": self.evaluation(),
            "learners_per_second": self.trained / self.seconds if self.trained and self.seconds > 0.0 else None,
            "training_seconds": round(self.training_seconds, 3),
            "seconds": round(self.seconds, 3),
            "notes": [asdict(note) for note in self.notes],
        }

    def require_work(self) -> None:
        """Refuse to call a run done that trained nobody and failed with nobody.

        Raises:
            NothingToTrain: with the reasons and the whole report.
        """
        if self.trained or self.failed or self.stopped:
            return
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(self.skipped.items()))
        if not reasons:
            raise NothingToTrain(_("No learner matches."), code="no_learners", result=self.to_json())
        raise NothingToTrain(_("No learner was trained: %s.") % reasons, result=self.to_json())

    def evaluation(self) -> dict[str, Any]:
        """Paired changes on the learners' later interactions; a change is candidate minus main: negative is better.

        ``mean_change`` and its neighbours are of the total loss of what is served. Beside them: ``heads`` of what is
        served, ``personal`` (the learners' tails, unblended) and ``control`` (another learner's model on the same
        interactions), each by head. Without an evaluated learner the figures are null.
        """
        choices = dict(sorted(self.choices.items()))
        if not self.evaluations:
            return {**dict.fromkeys(_EVALUATION), "learners": 0, "serving_choice": choices}
        main, served, personal = ([getattr(entry, name) for entry in self.evaluations] for name in ("main", "served", "personal"))
        heads = changes(main, served)
        total = heads["total"]
        return {
            "learners": len(main),
            "share_gaining": total["better"],
            "share_losing": total["worse"],
            "mean_change": total["mean"],
            "mean_change_interval": total["interval"],
            "worst_change": total["worst"],
            "metrics_main": mean_figures(main),
            "metrics_personal": mean_figures(served),
            "serving_choice": choices,
            "heads": heads,
            "personal": changes(main, personal),
            "control": changes([c.main for c in self.controls], [c.other for c in self.controls]) if self.controls else None,
        }


def changes(current: Sequence[LearnerLosses], candidate: Sequence[LearnerLosses]) -> dict[str, Any]:
    """Paired change by head and of the total, JSON-ready.

    Raises:
        EvaluationError: as ``paired_change``.
    """
    return {head: change.to_json() for head, change in paired_change(current, candidate).items()}


def mean_figures(losses: Sequence[LearnerLosses]) -> dict[str, float]:
    """Means over learners, each counting once."""
    return {name: math.fsum(getattr(entry, name) for entry in losses) / len(losses) for name in FIGURES}


_EVALUATION = (
    "share_gaining", "share_losing", "mean_change", "mean_change_interval", "worst_change", "metrics_main",
    "metrics_personal", "heads", "personal", "control",
)  # fmt: skip
