"""What the installation can say of its privacy: the same object for the command, the console and the API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from django.utils.translation import gettext as _

from aivo_site.errors import UsageError
from federation import ledger, privacy_periods
from federation.ledger_check import verify_ledger
from federation.models import PrivacyLedgerEntry, PrivacyPeriod, RoundAttempt
from federation.policies import PolicyError, RoundPolicy, default_policy
from federation.privacy.calibration import rounds_left, smallest_noise
from federation.privacy.composition import ComposedResult
from federation.privacy.release import AccountantError, default_delta
from federation.privacy.self_test import self_test
from federation.privacy.statements import UNNOISED, statement_of
from federation.rounds.private import privacy_of


@dataclass(frozen=True)
class Calibrate:
    """A question of how much noise a target needs.

    Attributes:
        targets: values of ε. rounds, population, rate: None for what the open period declares.
    """

    targets: Sequence[float]
    rounds: int | None = None
    population: int | None = None
    rate: Fraction | None = None


def privacy_report(
    *, with_self_test: bool = False, with_verification: bool = False, with_pld: bool = True, calibrate: Calibrate | None = None
) -> dict[str, Any]:
    """The JSON object of the command ``privacy_report``; what does not exist, or was not asked for, is null.

    Args:
        with_self_test: check this installation's mechanisms and figures; takes seconds.
        with_verification: compute every row of the ledger again.
        with_pld: also the tighter figure of the second accountant; takes seconds.

    Raises:
        UsageError: a calibration that cannot be answered.
    """
    period = privacy_periods.current_period()
    verification = verify_ledger() if with_verification else None
    return {
        "entries": PrivacyLedgerEntry.objects.count(),
        "delta": None if period is None else period.delta,
        "period": None if period is None else _described(period),
        **_figures(period, with_pld=with_pld),
        "forecast": None if period is None else forecast(period),
        "self_test": self_test().to_json() if with_self_test else None,
        "verified": None if verification is None else verification.verified,
        "verification": None if verification is None else verification.to_json(),
        "calibration": None if calibrate is None else calibrated(calibrate, period),
        "unnoised": [asdict(entry) for entry in UNNOISED],
        "attempts_without_charge": RoundAttempt.objects.filter(charge=None).exclude(aggregate_path="").count(),
    }


def history(period: PrivacyPeriod) -> list[dict[str, Any]]:
    """ε of the population after each of its charges in the period, for a chart."""
    return [
        {
            "sequence": row.sequence,
            "round": None if row.round is None else row.round.sequence,
            "at": row.created_at.isoformat(),
            "epsilon": row.epsilon,
            "epsilon_total": row.epsilon_total,
        }
        for row in ledger.charges(period, like=ledger.CENTRAL).filter(subject_key=None).select_related("round")
    ]


def forecast(period: PrivacyPeriod) -> dict[str, Any] | None:
    """How many more rounds of the installation's policy fit under the cap; null without a cap, or without a private policy.

    A policy that does not go with the period gives what is wrong with it in ``text``, and ``rounds`` null.
    """
    policy = RoundPolicy.from_row(default_policy())
    cap = ledger.lowest(period.epsilon_cap, policy.epsilon_cap, policy.target_epsilon)
    if cap is None or not policy.differential_privacy:
        return None
    try:
        policy.validate()
        privacy = privacy_of(policy)
    except PolicyError as error:
        return {"rounds": None, "cap": cap, "text": str(error)}
    if privacy is None:
        return None
    past = ledger.releases_of(ledger.charges(period, like=ledger.CENTRAL))
    found = rounds_left(past, privacy.release, cap, period.delta)
    text = _("With these settings the budget of ε = %(cap)g lasts %(n)d more rounds.") % {"cap": cap, "n": found.rounds}
    return {**found.to_json(), "text": text}


def calibrated(question: Calibrate, period: PrivacyPeriod | None) -> list[dict[str, Any]]:
    """The smallest noise multiplier for each target.

    Raises:
        UsageError: values out of range, or no population where no period is open.
    """
    population = question.population if question.population is not None else None if period is None else period.population
    if population is None:
        raise UsageError(_("--population is needed: no privacy period is open that declares one"), code="no_privacy_period")
    rate = question.rate if question.rate is not None else Fraction(1) if period is None else privacy_periods.rate_of(period)
    rounds = question.rounds if question.rounds is not None else 52 if period is None else period.planned_rounds
    try:
        own = period is not None and period.population == population
        delta = period.delta if own and period is not None else default_delta(population)
        return [_calibration(target, delta=delta, rate=rate, rounds=rounds) for target in question.targets]
    except AccountantError as error:
        raise UsageError(str(error), code=error.code) from error


def _calibration(target: float, *, delta: float, rate: Fraction, rounds: int) -> dict[str, Any]:
    found = smallest_noise(
        epsilon=target,
        delta=delta,
        q_num=rate.numerator,
        q_den=rate.denominator,
        steps=rounds,
        sampling="none" if rate == 1 else "poisson",
    )
    return {"target": target, "noise_multiplier": found.z, "rounds": rounds, "rate": str(rate), **_shown(found.composed)}


def _figures(period: PrivacyPeriod | None, *, with_pld: bool) -> dict[str, Any]:
    last = PrivacyPeriod.objects.first()
    if last is None:
        return {"epsilon_federation": None, "epsilon_learner_max": None, "epsilon_lifetime": None, "statements": []}
    lifetime = ledger.federation_epsilon(None, delta=last.delta)
    if period is None:
        return {"epsilon_federation": None, "epsilon_learner_max": None, "epsilon_lifetime": lifetime.epsilon, "statements": []}
    federation = ledger.federation_epsilon(period, delta=period.delta)
    seeing = ledger.federation_epsilon(period, delta=period.delta, seeing_cohort=True)
    tighter = ledger.federation_epsilon(period, delta=period.delta, accountant="pld") if with_pld else None
    return {
        "epsilon_federation": federation.epsilon,
        "epsilon_seeing_cohort": seeing.epsilon,
        "epsilon_pld": tighter.epsilon if tighter is not None and tighter.accountant == "pld" else None,
        "epsilon_pld_fallback": tighter.fallback or None if tighter is not None else None,
        "epsilon_learner_max": max((epsilon for _key, epsilon in ledger.learner_epsilons(period)), default=None),
        "epsilon_lifetime": lifetime.epsilon,
        "statements": [
            statement_of(federation, population=period.population).to_json(),
            statement_of(seeing, population=period.population, seeing_cohort=True).to_json(),
        ],
        "history": history(period),
    }


def _shown(composed: ComposedResult) -> dict[str, Any]:
    return {"epsilon": composed.epsilon, "delta": composed.delta, "accountant": composed.accountant}


def _described(period: PrivacyPeriod) -> dict[str, Any]:
    return {
        "number": period.number,
        "population": period.population,
        "delta": period.delta,
        "rate": str(privacy_periods.rate_of(period)),
        "expected_cohort": privacy_periods.expected_cohort(period),
        "planned_rounds": period.planned_rounds,
        "epsilon_cap": period.epsilon_cap,
        "epsilon_cap_learner": period.epsilon_cap_learner,
        "started_at": period.started_at.isoformat(),
        "meaning": period.meaning,
    }
