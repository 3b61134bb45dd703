"""The gate: candidate against current on learners outside the round, and the rule that decides. NumPy only, no Django.

A change is candidate minus current: negative is better. The gate fails closed: whatever is missing, too little or not a
number means that the candidate is not promoted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models_store.bootstrap import Change
from models_store.evaluation import EvaluationError, LearnerLosses, paired_change

METRICS = ("total", "content", "path", "score")
DEFAULT_TOLERANCES: Mapping[str, float] = {"total": 0.0, "content": 0.002, "path": 0.002, "score": 0.002}
"""How much worse each guarded metric's mean may become: the total not at all, a head by .002 nats."""

GROUP_MINIMUM = 10
"""Smaller groups are not shown: a figure of few children says who they are and little else."""

DETECTABLE = 1.959964 + 0.841621
"""Standard normal quantiles of a two-sided 5 % test that finds the effect in 80 % of cases (Cohen 1988, chapter 2)."""


@dataclass(frozen=True)
class GateRules:
    """When a candidate passes.

    Attributes:
        tolerances: largest allowed mean change per guarded metric; empty takes ``DEFAULT_TOLERANCES``.
        minimum_learners: fewer measured learners are no evidence.
        minimum_gain: the metric that must be better must fall by at least this.
        draws: of the bootstrap.
    """

    tolerances: Mapping[str, float]
    minimum_learners: int
    minimum_gain: float = 0.0
    draws: int = 2000

    @property
    def guarded(self) -> Mapping[str, float]:
        return self.tolerances or DEFAULT_TOLERANCES


@dataclass(frozen=True)
class GateDecision:
    """What the gate says; ``code`` is empty when the candidate passes.

    ``code``: ``gate_no_evidence``, ``gate_worse``, ``gate_not_better``.
    """

    code: str
    reason: str
    report: dict[str, Any]
    improvement: float | None = None

    @property
    def passed(self) -> bool:
        return not self.code


def decide(
    current: Sequence[LearnerLosses],
    candidate: Sequence[LearnerLosses],
    *,
    rules: GateRules,
    groups: Mapping[str, Mapping[str, Sequence[str]]],
) -> GateDecision:
    """Compare and decide: no guarded metric worse than its tolerance, and at least one better.

    Better means that the mean falls by ``minimum_gain`` and the 95 % interval lies below zero: of the total where it is
    guarded, else of any guarded metric.

    Args:
        current, candidate: losses of the same learners on the same samples.
        groups: by kind (``grade_band``, ``need``, ``language``), by name, the keys of its learners.
    """
    if len(current) < rules.minimum_learners:
        reason = f"{len(current)} learners could be measured, the policy asks for {rules.minimum_learners}"
        return no_evidence(reason, "too_few_learners", learners=len(current))
    try:
        changes = paired_change(current, candidate, draws=rules.draws)
    except EvaluationError as error:
        return no_evidence(str(error), error.code, learners=len(current))
    report = _report(current, candidate, changes, rules, groups)
    code, reason = _verdict(changes, rules)
    report.update(passed=not code, reason_code=code, reason=reason)
    return GateDecision(code, reason, report, improvement=changes["total"].relative_fall)


def no_evidence(reason: str, error: str, *, learners: int = 0) -> GateDecision:
    """The decision where losses are missing, too few or no numbers."""
    report = {"learners": learners, "error": error, "passed": False, "reason_code": "gate_no_evidence", "reason": reason}
    return GateDecision("gate_no_evidence", reason, report)


def _verdict(changes: Mapping[str, Change], rules: GateRules) -> tuple[str, str]:
    unknown = sorted(set(rules.guarded) - set(changes))
    if unknown:
        return "gate_no_evidence", f"guarded metrics that are not measured: {', '.join(unknown)}"
    for name, tolerance in rules.guarded.items():
        if not changes[name].mean <= tolerance:  # not <=: a value that is not a number must not pass
            return "gate_worse", f"{name} changes by {changes[name].mean:+.4f}, allowed is {tolerance:+.4f}"
    decisive = ["total"] if "total" in rules.guarded else list(rules.guarded)
    if not any(changes[name].interval[1] < 0.0 and changes[name].mean <= -rules.minimum_gain for name in decisive):
        low, high = changes[decisive[0]].interval
        return "gate_not_better", (
            f"{decisive[0]} changes by {changes[decisive[0]].mean:+.4f} (interval {low:+.4f} to {high:+.4f}); it must fall by "
            f"{rules.minimum_gain:g} or more, with the interval below zero"
        )
    return "", ""


def _report(
    current: Sequence[LearnerLosses],
    candidate: Sequence[LearnerLosses],
    changes: Mapping[str, Change],
    rules: GateRules,
    groups: Mapping[str, Mapping[str, Sequence[str]]],
) -> dict[str, Any]:
    shown, hidden = _groups(current, candidate, rules, groups)
    return {
        "learners": len(current),
        "samples": sum(loss.samples for loss in current),
        "tolerances": dict(rules.guarded),
        "minimum_gain": rules.minimum_gain,
        "metrics": {"current": _figures(current, changes, "current"), "candidate": _figures(candidate, changes, "candidate")},
        "changes": {name: changes[name].to_json() for name in METRICS},
        "relative_fall": {name: changes[name].relative_fall for name in METRICS},
        "minimum_detectable_effect": _detectable(current, candidate),
        "groups": shown,
        "groups_too_small": hidden,
    }


def _figures(losses: Sequence[LearnerLosses], changes: Mapping[str, Change], side: str) -> dict[str, float]:
    figures = {name: float(getattr(changes[name], side)) for name in METRICS}
    for name in ("content_top1", "content_top5", "path_top1", "score_first"):
        figures[name] = math.fsum(getattr(loss, name) for loss in losses) / len(losses)
    return figures


def _groups(
    current: Sequence[LearnerLosses],
    candidate: Sequence[LearnerLosses],
    rules: GateRules,
    groups: Mapping[str, Mapping[str, Sequence[str]]],
) -> tuple[dict[str, Any], dict[str, int]]:
    """Per kind and group its change and what it could have shown; how many groups of each kind are too small."""
    before = {loss.key: loss for loss in current}
    after = {loss.key: loss for loss in candidate}
    shown: dict[str, Any] = {}
    hidden: dict[str, int] = {}
    for kind, members in sorted(groups.items()):
        for name, keys in sorted(members.items()):
            measured = [key for key in sorted(keys) if key in before]
            if len(measured) < GROUP_MINIMUM:
                hidden[kind] = hidden.get(kind, 0) + 1
                continue
            one, two = [before[key] for key in measured], [after[key] for key in measured]
            changes = paired_change(one, two, draws=rules.draws)
            shown.setdefault(kind, {})[name] = {
                "learners": len(measured),
                "changes": {
                    metric: {"mean": changes[metric].mean, "interval": list(changes[metric].interval)} for metric in METRICS
                },
                "minimum_detectable_effect": _detectable(one, two),
            }
    return shown, hidden


def _detectable(current: Sequence[LearnerLosses], candidate: Sequence[LearnerLosses]) -> dict[str, float | None]:
    """Smallest mean change of each metric that so many learners would show in 80 % of cases; null for one learner."""
    after = {loss.key: loss.heads() for loss in candidate}
    effects: dict[str, float | None] = {}
    for name in METRICS:
        change = np.array([after[loss.key][name] - loss.heads()[name] for loss in current], dtype=np.float64)
        n = len(change)
        effects[name] = DETECTABLE * float(change.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return effects
