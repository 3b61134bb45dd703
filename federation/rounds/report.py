"""What a round says of itself: the same object in commands, jobs and the console."""

from __future__ import annotations

from collections import Counter
from typing import Any

from federation.models import AggregationRound, Contribution, Verdict
from federation.rounds import private


def describe_round(round_: AggregationRound) -> dict[str, Any]:
    """The JSON object of ``run_federated_aggregation`` for a round, less ``seconds``; what does not exist is null."""
    round_.refresh_from_db()
    metrics = round_.gate.get("metrics", {})
    return {
        "round": round_.sequence,
        "state": str(round_.state),
        "reason": round_.reason or None,
        "reason_code": round_.reason_code or None,
        "base_version": round_.base_version.version,
        "candidate_version": None if round_.candidate_version is None else round_.candidate_version.version,
        "eligible": round_.eligible,
        "excluded": dict(round_.excluded),
        "accepted": Contribution.objects.filter(round=round_, verdict=Verdict.ACCEPTED).count(),
        "rejected": rejected_by_reason(round_),
        "metrics": {"current": metrics.get("current"), "candidate": metrics.get("candidate")},
        "performance_improvement": round_.performance_improvement,
        "gate": round_.gate or None,
        "privacy": private.described(round_),
    }


def rejected_by_reason(round_: AggregationRound) -> dict[str, int]:
    """Rejected and quarantined contributions by reason code."""
    refused = Contribution.objects.filter(round=round_, verdict__in=(Verdict.REJECTED, Verdict.QUARANTINED))
    return dict(sorted(Counter(refused.values_list("reason_code", flat=True)).items()))
