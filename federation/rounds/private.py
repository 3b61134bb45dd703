"""What differential privacy adds to a round: who is drawn, what is charged, which noise covers the sum.

Everything that decides is fixed before anybody's data is looked at: the policy that the round keeps, and the privacy period,
which cannot begin or end while a round is open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from django.utils.translation import gettext as _

from aivo_core.privacy_mechanisms import GaussianSumMechanism
from aivo_core.privacy_sampling import poisson_cohort
from federation import ledger, privacy_periods
from federation.models import AggregationRound, FederationPolicy, PrivacyLedgerEntry, PrivacyPeriod, Sampling
from federation.policies import PolicyError, RoundPolicy
from federation.privacy.accountant import AccountantError
from federation.privacy.calibration import smallest_noise
from federation.privacy.composition import ComposedResult, compose
from federation.privacy.release import Release
from federation.privacy.statements import statement_of
from federation.privacy_policy import EPSILON_LIMIT, too_large
from learners.models import Learner

Member = TypeVar("Member")
BudgetSpent = Callable[[Learner], bool]


@dataclass(frozen=True)
class RoundPrivacy:
    """The privacy of one round.

    Attributes:
        release: what each of its attempts releases.
        cap: largest ε of the period for the whole population, None for none.
        override_reason: why ε may exceed the product's limit; empty where it does not.
    """

    period: PrivacyPeriod
    policy: RoundPolicy
    release: Release
    clip_norm: float
    cap: float | None
    override_reason: str

    def mechanism(self) -> GaussianSumMechanism:
        """A new mechanism, for one attempt: its noise is drawn once."""
        return GaussianSumMechanism(
            clip_norm=self.clip_norm,
            noise_multiplier=self.release.z,
            expected_cohort=privacy_periods.expected_cohort(self.period),
        )

    def check_may_begin(self) -> None:
        """Refuse before anything is trained what would be refused before the release.

        Raises:
            PeriodError: more learners than were declared. BudgetSpent: the next round would exceed a cap.
        """
        privacy_periods.check_population(self.period.population)
        ledger.check_affordable(self.period, self.release, self.cap)

    def draw(self, eligible: Sequence[Member]) -> list[Member]:
        """Who takes part: everyone, or each with the period's probability."""
        rate = privacy_periods.rate_of(self.period)
        return list(eligible) if rate == 1 else poisson_cohort(eligible, rate.numerator, rate.denominator)

    def budget_spent(self) -> BudgetSpent:
        """Whether a learner has to be left out; it depends on when the learner joined and on charges alone."""
        account = ledger.LearnerAccount(self.period, following=self.release)
        shared = account.epsilon_of_population()
        caps = {
            row.organisation_id: (row.epsilon_cap, row.epsilon_cap_learner)
            for row in FederationPolicy.objects.filter(organisation__isnull=False)
        }
        own = (self.period.epsilon_cap_learner, self.policy.epsilon_cap_learner)

        def spent(learner: Learner) -> bool:
            federation, person = caps.get(learner.organisation_id, (None, None))
            limit = ledger.lowest(*own, person)
            if federation is not None and shared > federation:
                return True
            return limit is not None and account.epsilon(learner.subject_key, learner.created_at) > limit

        return spent

    def charge(self, round_: AggregationRound) -> PrivacyLedgerEntry:
        """Charge one attempt; release nothing before the surrounding transaction has committed.

        Raises:
            BudgetSpent, LedgerError: nothing may be released.
        """
        return ledger.charge(
            period=self.period,
            release=self.release,
            clip_norm=self.clip_norm,
            mechanism=GaussianSumMechanism.name,
            round=round_,
            cap=self.cap,
            override_reason=self.override_reason,
        )


def privacy_of(policy: RoundPolicy) -> RoundPrivacy | None:
    """The privacy of a round with this policy; None for one without, which no privacy period may be open for.

    Args:
        policy: validated, or one that a round keeps.

    Raises:
        PolicyError: ``privacy_period_open``, ``no_privacy_period``, ``wrong_sampling``, ``cohort_too_small``,
            ``epsilon_too_large``, or that of the accountant: the policy does not go with the open period.
    """
    period = privacy_periods.current_period()
    if not policy.differential_privacy:
        if period is not None:
            text = _(
                "Privacy period %d is open: a round without differential_privacy would release what no ε covers. End it first."
            )
            raise PolicyError(text % period.number, code="privacy_period_open")
        return None
    if period is None or policy.clip_norm is None:
        text = _("No privacy period is open: begin one that declares the population, with the command privacy_period.")
        raise PolicyError(text, code="no_privacy_period")
    _check_fits(policy, period)
    try:
        release = _release(policy, period)
        planned = compose([replace(release, steps=period.planned_rounds)], period.delta).epsilon
    except AccountantError as error:
        raise PolicyError(str(error), code=error.code) from error
    above = planned > EPSILON_LIMIT
    if above and not policy.epsilon_override_reason.strip():
        what = _("noise multiplier %(z)g over the period's %(n)d planned rounds") % {"z": release.z, "n": period.planned_rounds}
        code, message = too_large(planned, what)
        raise PolicyError(message, code=code)
    return RoundPrivacy(
        period=period,
        policy=policy,
        release=release,
        clip_norm=float(policy.clip_norm),
        cap=ledger.lowest(policy.epsilon_cap, policy.target_epsilon),
        override_reason=policy.epsilon_override_reason.strip() if above else "",
    )


def described(round_: AggregationRound) -> dict[str, Any] | None:
    """What a round cost and what that means; None for a round without differential privacy.

    ``epsilon`` is that of all the round's attempts together, ``epsilon_period`` that of the period after them.
    """
    if not round_.policy.get("differential_privacy"):
        return None
    rows = list(round_.charges.select_related("period").order_by("sequence"))
    if not rows:
        return {"epsilon": 0.0, "charges": 0}
    last, period = rows[-1], rows[-1].period
    spent, seeing = _composed(rows), _composed(rows, seeing_cohort=True)
    return {
        "epsilon": spent.epsilon,
        "epsilon_period": last.epsilon_total,
        "epsilon_seeing_cohort": seeing.epsilon,
        "delta": last.delta,
        "charges": len(rows),
        "unit": str(last.unit),
        "adjacency": str(last.adjacency),
        "sampling": str(last.sampling),
        "rate": f"{last.q_num}/{last.q_den}",
        "population": period.population,
        "expected_cohort": privacy_periods.expected_cohort(period),
        "noise_multiplier": last.noise_multiplier,
        "clip_norm": last.clip_norm,
        "accountant": last.accountant,
        "accountant_version": last.accountant_version,
        "conversion": last.conversion,
        "statement": statement_of(spent, population=period.population).text,
    }


def epsilon_of(round_: AggregationRound) -> float | None:
    """ε of all the round's attempts together; None for a round that charged nothing."""
    rows = list(round_.charges.select_related("period").order_by("sequence"))
    return _composed(rows).epsilon if rows else None


def _composed(rows: Sequence[PrivacyLedgerEntry], *, seeing_cohort: bool = False) -> ComposedResult:
    releases = ledger.releases_of(rows)
    if seeing_cohort:
        releases = [release.to_those_who_see_the_cohort() for release in releases]
    return compose(releases, rows[0].delta)


def _check_fits(policy: RoundPolicy, period: PrivacyPeriod) -> None:
    rate = privacy_periods.rate_of(period)
    wanted = Sampling.NONE if rate == 1 else Sampling.POISSON
    if policy.sampling != wanted:
        text = _("sampling must be %(wanted)s, not %(given)s: privacy period %(n)d declares the rate %(rate)s")
        values = {"wanted": wanted, "given": policy.sampling, "n": period.number, "rate": rate}
        raise PolicyError(text % values, code="wrong_sampling")
    cohort = privacy_periods.expected_cohort(period)
    if cohort < policy.minimum_learners:
        text = _("minimum_learners must be at most %(cohort)g, the expected cohort of privacy period %(n)d, not %(given)d")
        values = {"cohort": cohort, "n": period.number, "given": policy.minimum_learners}
        raise PolicyError(text % values, code="cohort_too_small")


def _release(policy: RoundPolicy, period: PrivacyPeriod) -> Release:
    """One attempt; with a target ε, with the least noise with which the period's planned rounds cost no more."""
    rate = privacy_periods.rate_of(period)
    kind = Release(
        z=policy.noise_multiplier or 1.0,
        q_num=rate.numerator,
        q_den=rate.denominator,
        sampling="none" if rate == 1 else "poisson",
    )
    if policy.target_epsilon is None:
        return kind
    found = smallest_noise(
        epsilon=policy.target_epsilon,
        delta=period.delta,
        q_num=kind.q_num,
        q_den=kind.q_den,
        steps=period.planned_rounds,
        sampling=kind.sampling,
    )
    return replace(kind, z=found.z)
