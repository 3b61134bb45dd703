"""The candidate: the base version with its tail moved by the aggregate, as a new immutable version."""

from __future__ import annotations

from typing import Any

import numpy as np
from django.utils.translation import gettext as _

from aivo_core.network import FloatArray
from federation.models import AggregationRound, RoundAttempt
from federation.policies import RoundPolicy
from federation.rounds import private
from federation.rounds.errors import RoundFailed
from models_store import store, versions
from models_store.models import MainModelVersion, VersionOrigin, VersionStatus
from models_store.store import LoadedVersion


def candidate_tail(base: LoadedVersion, aggregate: FloatArray, server_learning_rate: float) -> FloatArray:
    """Base tail + server learning rate times the aggregate, (tail_size,) float32; trunk and statistics are not touched.

    Computed in float64 and rounded once.

    Raises:
        RoundFailed: ``not_finite``: the moved tail does not fit into float32.
    """
    with np.errstate(over="ignore"):
        moved = (base.tail.astype(np.float64) + server_learning_rate * aggregate.astype(np.float64)).astype(np.float32)
    if not np.isfinite(moved).all():
        raise RoundFailed(
            _("The update moves the tail beyond what float32 holds: lower the server learning rate."), code="not_finite"
        )
    return moved


def reserve_candidate(round_: AggregationRound) -> MainModelVersion:
    """The round's version row, in the caller's transaction; the same one however often it is asked for."""
    if round_.candidate_version is not None:
        return round_.candidate_version
    base = round_.base_version
    return versions.reserve_version(
        origin=VersionOrigin.FEDERATED,
        parent=base,
        architecture=base.architecture,
        encoder_sha256=base.encoder_sha256,
        metadata={"round": round_.sequence},
    )


def publish_candidate(
    round_: AggregationRound,
    *,
    attempt: RoundAttempt,
    policy: RoundPolicy,
    base: LoadedVersion,
    tail: FloatArray,
    samples: int,
) -> MainModelVersion:
    """Write the candidate's files and point its row to them; a candidate that has its files already stays as it is.

    Files may be exported: a private round's say nothing of who took part, not even how many.

    Nothing in the files depends on the time, so that doing it again gives the same bytes.

    """
    row = round_.candidate_version
    if row is None:
        raise AssertionError("a candidate is reserved before it is published")
    row.refresh_from_db()
    if row.status != VersionStatus.TRAINING:
        return row
    metrics = training_metrics(round_, policy, None if policy.differential_privacy else samples)
    lineage: dict[str, Any] = {
        "origin": str(VersionOrigin.FEDERATED),
        "parent": base.version,
        "round": round_.sequence,
        "strategy": policy.strategy,
        "server_learning_rate": policy.server_learning_rate,
        **_who_took_part(round_, attempt, policy),
    }
    files = store.write_version_files(
        version=row.version,
        spec=base.spec,
        weights=base.spec.with_tail(base.weights, tail),
        encoder=base.encoder,
        content_mix=base.content_mix,
        metrics=metrics,
        lineage=lineage,
        card=_card(row, round_, attempt, policy),
    )
    versions.publish(
        row=row,
        files=files,
        status=VersionStatus.CANDIDATE,
        content_mix=base.content_mix,
        architecture=base.spec.to_json(),
        training_metrics=metrics,
        metadata={"lineage": lineage},
    )
    return row


def _who_took_part(round_: AggregationRound, attempt: RoundAttempt, policy: RoundPolicy) -> dict[str, Any]:
    if policy.differential_privacy:
        return {"privacy": private.described(round_)}
    return {"attempt": attempt.n, "set_digest": attempt.set_digest, "contributions": attempt.contributions}


def training_metrics(round_: AggregationRound, policy: RoundPolicy, samples: int | None) -> dict[str, Any]:
    """What the row and the manifest say: the gate's figures of the candidate; null where the gate had no evidence."""
    figures = round_.gate.get("metrics", {}).get("candidate") or {}
    return {
        "accuracy": figures.get("content_top1"),
        "loss": figures.get("total"),
        "epochs": policy.local_epochs,
        "samples": samples,
        "gate": {key: round_.gate.get(key) for key in ("learners", "samples", "metrics", "changes")},
    }


def _card(row: MainModelVersion, round_: AggregationRound, attempt: RoundAttempt, policy: RoundPolicy) -> str:
    change = round_.gate.get("changes", {}).get("total")
    measured = (
        _(
            "On %(learners)d learners outside the round the total loss changed by %(mean)+.4f "
            "(95 %% interval %(low)+.4f to %(high)+.4f)."
        )
        % {
            "learners": round_.gate["learners"],
            "mean": change["mean"],
            "low": change["interval"][0],
            "high": change["interval"][1],
        }
        if change
        else _("It could not be measured on learners outside the round.")
    )
    return "\n".join(
        (
            f"# {row.version}",
            "",
            _made_by(round_, attempt, policy),
            measured,
            _("Only the tail differs from the base version; trunk, normalisation statistics and encoder are the base's own."),
            "",
        )
    )


def _made_by(round_: AggregationRound, attempt: RoundAttempt, policy: RoundPolicy) -> str:
    values = {
        "round": round_.sequence,
        "base": round_.base_version.version,
        "n": attempt.contributions,
        "strategy": policy.strategy,
        "rate": policy.server_learning_rate,
    }
    privacy = private.described(round_)
    if privacy is None:
        return (
            _("Made by round %(round)d from %(base)s: %(n)d contributions, strategy %(strategy)s, server learning rate %(rate)g.")
            % values
        )
    made = _("Made by round %(round)d from %(base)s: strategy %(strategy)s, server learning rate %(rate)g.") % values
    return f"{made} {privacy['statement']}"
