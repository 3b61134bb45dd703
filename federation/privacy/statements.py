"""What an epsilon of this product means, in words: who is protected against whom, against what, and what is not covered.

No figure is shown without its statement, so that nobody reads more into it than was done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp
from typing import Any

from federation.privacy.composition import ComposedResult
from federation.privacy.release import Release

PUBLIC, OPERATORS = "everyone who receives a model or a recommendation", "operators, auditors and database administrators"


@dataclass(frozen=True, slots=True)
class Unnoised:
    """Something that leaves without noise, and who sees it."""

    what: str
    seen_by: str


UNNOISED: tuple[Unnoised, ...] = (
    Unnoised("the first main model and its encoder's tables, made from curriculum learners", PUBLIC),
    Unnoised("the gate's figures and with them whether a version became active, made from evaluation learners", PUBLIC),
    Unnoised("how many learners are eligible, and that a round was skipped", OPERATORS),
    Unnoised("who was drawn for a round, norms and verdicts of contributions", OPERATORS),
    Unnoised("that a round failed because somebody who took part in it withdrew", OPERATORS),
    Unnoised("personal tails and deltas, which lie on the server as they are", OPERATORS),
    Unnoised("serving choices, rebase factors, blends and how gains are distributed", OPERATORS),
    Unnoised("anything that a person tunes after looking at private rounds", PUBLIC),
    Unnoised("rounds run without differential privacy, before, between and after privacy periods", PUBLIC),
)
"""The whole list of what the learners' or others' data shape and no noise covers."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One epsilon in words.

    Attributes:
        protects: whom. against: whom. unit, adjacency, sampling, delta, accountant: what the figure assumes.
        not_covered: what leaves un-noised, and who sees it.
    """

    epsilon: float
    protects: str
    against: str
    unit: str
    adjacency: str
    sampling: str
    delta: str
    accountant: str
    text: str
    not_covered: tuple[Unnoised, ...] = UNNOISED

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def statement_of(composed: ComposedResult, *, population: int | None = None, seeing_cohort: bool = False) -> Statement:
    """The statement of an epsilon over releases by rounds (unit learner) or by local training (unit training sample).

    Args:
        population: N₀, the learners declared; None where the unit is no learner.
        seeing_cohort: the figure is that against those who know who took part.
    """
    releases = composed.releases
    amplified = any(release.sampling != "none" for release in releases)
    if not seeing_cohort and amplified:
        against = f"{PUBLIC}, as long as they do not know who took part in a round"
    else:
        against = f"{PUBLIC}, whether or not they know who took part in a round"
    unit = _UNITS[composed.unit or "learner"]
    adjacency = _ADJACENCIES[composed.adjacency or "add_or_remove_one"]
    sampling = _sampling(releases)
    delta = _delta(composed.delta, population)
    accountant = f"{composed.accountant.upper()}, {composed.accountant_version}, conversion: {composed.conversion}"
    if composed.fallback:
        accountant += f"; {composed.requested.upper()} was asked for: {composed.fallback}"
    factor = f"{exp(composed.epsilon):.3g}" if composed.epsilon < 700.0 else f"e^{composed.epsilon:.0f}"
    count = sum(release.steps for release in releases)
    text = (
        f"Protected is {unit.protects}. Over {count} release{'' if count == 1 else 's'}, whatever {against} can see is at most "
        f"{factor} times as likely as if {adjacency.event}, and at least 1/{factor} times (epsilon = {composed.epsilon:.4g}), "
        f"except with probability {composed.delta:.3g} (delta). {unit.limit}"
    )
    return Statement(
        epsilon=composed.epsilon,
        protects=unit.protects,
        against=against,
        unit=unit.meaning,
        adjacency=adjacency.meaning,
        sampling=sampling,
        delta=delta,
        accountant=accountant,
        text=text,
    )


@dataclass(frozen=True, slots=True)
class _Unit:
    protects: str
    meaning: str
    limit: str


@dataclass(frozen=True, slots=True)
class _Adjacency:
    meaning: str
    event: str


_UNITS = {
    "learner": _Unit(
        "whether a learner took part in the rounds at all",
        "learner: everything that one learner contributed to all rounds together",
        "It does not hold against whoever can read this server's files or database.",
    ),
    "training_sample": _Unit(
        "whether one training sample was in a learner's training",
        "training sample: both passes over one event, drawn and clipped together; an interaction leaves traces in all later "
        "samples too, so that neither an interaction nor a learner is meant",
        "It holds for one sample of one learner, against whoever sees what the training made.",
    ),
}
_ADJACENCIES = {
    "add_or_remove_one": _Adjacency("add or remove one: two data sets differ by the presence of one", "they had been left out"),
    "replace_one": _Adjacency(
        "replace one: two data sets differ by the content of one", "anything else had stood in their place"
    ),
}


def _sampling(releases: Sequence[Release]) -> str:
    words = []
    for release in releases:
        rate = f"{release.q_num}/{release.q_den}"
        words.append(
            {
                "none": "everyone takes part",
                "poisson": f"each member of the declared population is drawn independently with probability {rate}",
                "fixed_size": f"{release.q_num} of {release.q_den} are drawn without replacement",
            }[release.sampling]
        )
    return "; ".join(dict.fromkeys(words)) or "nothing was released"


def _delta(delta: float, population: int | None) -> str:
    text = f"delta = {delta:.3g}: the probability with which the factor may be exceeded"
    if population is None:
        return text
    return f"{text}; it lies below 1/N = {1.0 / population:.3g} for the declared population of {population}"
