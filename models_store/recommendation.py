"""What a recommendation says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from models_store.explanation import Contribution


@dataclass(frozen=True)
class ServedBy:
    """Which model answers: ``MAIN``, ``PERSONAL`` or ``BLEND``, the main version, and the learner's own version if any.

    ``note`` says why the learner's own model was passed over: ``withdrawn``, ``damaged``; empty otherwise.
    """

    choice: str
    blend: float
    main_version: str
    personal_version: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Recommendation:
    """The next step for a learner.

    Attributes:
        basis: ``learner``, or ``curriculum`` while the learner has no event: then nothing is about this learner.
        events: events of the learner that it stands on.
        category: name of the recommended category; ``category_probability`` its chance of coming next.
        level: 1..9; ``success_probability`` the chance of a right answer there; ``target`` the wanted one.
        target_reached: within .1 of the target; else ``above_target`` says whether even the hardest level is easier than
            wanted (True), or even the easiest one harder (False); None where the target is reached or lies between levels.
        attained_level: expected highest level the learner would get right in the category, 0..9; None by curriculum.
        path: name of the most probable kind of step; None by curriculum. ``path_probability`` its chance.
        content: (128,) chances of the category slots, the mixture. categories: names of the slots, "" for one without.
        difficulty: (10,) distribution of the attained level in the category; None by curriculum.
        success: (9,) chance of a right answer at the levels 1..9 in the category.
        path_probabilities: (32,) chances of the path ids; None by curriculum.
        why: contribution of each feature group; empty by curriculum.
    """

    learner_id: str
    basis: str
    events: int
    category: str
    category_probability: float
    level: int
    success_probability: float
    target: float
    target_reached: bool
    above_target: bool | None
    attained_level: float | None
    path: str | None
    path_probability: float | None
    content: tuple[float, ...]
    categories: tuple[str, ...]
    difficulty: tuple[float, ...] | None
    success: tuple[float, ...]
    path_probabilities: tuple[float, ...] | None
    served_by: ServedBy
    why: tuple[Contribution, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NotRecommended:
    """A learner of a batch who gets no recommendation: ``code`` and ``message`` of the error that ``recommend`` would raise."""

    learner_id: str
    code: str
    message: str
