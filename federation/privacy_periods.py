"""Privacy periods: the stretches of time over which releases compose, begun and ended only on purpose and with a reason.

What a period declares (the population N₀, δ, the sampling rate, what sums are divided by, the caps) is fixed for its whole
length: figures of releases under other constants could not be read together.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Max
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_core.privacy_sampling import MAX_DENOMINATOR
from aivo_site.audit import services as audit
from federation.errors import PeriodError
from federation.models import AggregationRound, PrivacyPeriod
from federation.privacy.release import AccountantError, check_delta, check_epsilon, default_delta
from learners.models import Learner, Pool

MOST = 2**31 - 1
BEGUN, ENDED = "privacy_period.begun", "privacy_period.ended"
"""Actions in the audit log."""

DECLARED = (
    "population", "delta", "q_num", "q_den", "expected_cohort", "planned_rounds", "epsilon_cap", "epsilon_cap_learner", "meaning",
)  # fmt: skip
"""What a period declares, as the audit log keeps it."""


@dataclass(frozen=True, kw_only=True)
class PeriodTerms:
    """What a new period declares.

    Attributes:
        population: N₀, the most learners there can be while the period lasts; at least 2.
        delta: None for min(1e-5, N₀^-1.1); below 1/N₀.
        rate: q, the probability with which a learner is drawn for a round, in (0, 1]; 1 is everyone.
        expected_cohort: what sums are divided by; None for q N₀, never more.
        planned_rounds: for how many rounds noise that follows from a target ε is enough.
        epsilon_cap, epsilon_cap_learner: rounds and learners stop before ε exceeds them; None for no cap.
    """

    population: int
    delta: float | None = None
    rate: Fraction = Fraction(1)
    expected_cohort: float | None = None
    planned_rounds: int = 52
    epsilon_cap: float | None = None
    epsilon_cap_learner: float | None = None

    def checked_delta(self) -> float:
        """Check every field.

        Returns:
            δ, the default where none is given.

        Raises:
            PeriodError: ``bad_period``.
        """
        for name, value, least in (("population", self.population, 2), ("planned_rounds", self.planned_rounds, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
                text = _("%(field)s must be a whole number of at least %(least)d, not %(given)s")
                raise PeriodError(text % {"field": name, "least": least, "given": ascii(value)[:80]})
        if not 0 < self.rate <= 1 or self.rate.denominator > MAX_DENOMINATOR:
            raise PeriodError(_("rate must be a fraction above 0 and at most 1, not %s") % self.rate)
        cohort, most = self.denominator, float(self.rate * self.population)
        if not (isfinite(cohort) and 1.0 <= cohort <= most):
            text = _("expected_cohort must be a number from 1 to rate times population, %(most)g, not %(given)s")
            raise PeriodError(text % {"most": most, "given": cohort})
        try:
            for name in ("epsilon_cap", "epsilon_cap_learner"):
                if getattr(self, name) is not None:
                    check_epsilon(getattr(self, name), name)
            return check_delta(default_delta(self.population) if self.delta is None else self.delta, self.population)
        except AccountantError as error:
            raise PeriodError(str(error)) from error

    @property
    def denominator(self) -> float:
        """What sums are divided by."""
        return float(self.rate * self.population) if self.expected_cohort is None else float(self.expected_cohort)


def current_period() -> PrivacyPeriod | None:
    """The period that is open, if any."""
    return PrivacyPeriod.objects.filter(ended_at__isnull=True).first()


def rate_of(period: PrivacyPeriod) -> Fraction:
    """The period's sampling rate q."""
    return Fraction(period.q_num, period.q_den)


def expected_cohort(period: PrivacyPeriod) -> float:
    """What the period's sums are divided by."""
    return float(rate_of(period) * period.population) if period.expected_cohort is None else period.expected_cohort


def begin_period(*, terms: PeriodTerms, meaning: str, actor: str) -> PrivacyPeriod:
    """Begin a period; none may be open. From here on ε counts from 0 again, beside the lifetime's, which goes on.

    Args:
        meaning: why ε may count anew, in words; kept with the period and in the audit log.

    Raises:
        PeriodError: terms that cannot be (``bad_period``), an empty meaning (``no_meaning``), a period that is open
            (``period_open``), a round that is open (``round_running``), fewer declared than there are (``population_too_small``).
    """
    delta = terms.checked_delta()
    _check_words(meaning)
    check_population(terms.population)
    values: dict[str, Any] = {
        "population": terms.population,
        "delta": delta,
        "q_num": terms.rate.numerator,
        "q_den": terms.rate.denominator,
        "expected_cohort": terms.expected_cohort,
        "planned_rounds": terms.planned_rounds,
        "epsilon_cap": terms.epsilon_cap,
        "epsilon_cap_learner": terms.epsilon_cap_learner,
    }
    try:
        with transaction.atomic():
            _check_no_round()
            if current_period() is not None:
                raise _is_open()
            last = PrivacyPeriod.objects.aggregate(last=Max("number"))["last"] or 0
            period = PrivacyPeriod.objects.create(number=last + 1, started_at=timezone.now(), meaning=meaning.strip(), **values)
            _record(BEGUN, period, actor, {name: getattr(period, name) for name in DECLARED})
    except IntegrityError as error:
        raise _is_open() from error
    return period


def end_period(*, reason: str, actor: str) -> PrivacyPeriod:
    """End the open period; nothing private can be released until another begins.

    Raises:
        PeriodError: no reason (``no_meaning``), no open period (``no_privacy_period``), an open round (``round_running``).
    """
    _check_words(reason)
    with transaction.atomic():
        period = PrivacyPeriod.objects.select_for_update().filter(ended_at__isnull=True).first()
        if period is None:
            raise PeriodError(_("No privacy period is open."), code="no_privacy_period")
        _check_no_round()
        period.ended_at = timezone.now()
        period.save(update_fields=["ended_at", "updated_at"])
        _record(ENDED, period, actor, {"reason": reason.strip()})
    return period


def check_population(population: int) -> None:
    """Refuse a declared population smaller than the learners there are.

    Raises:
        PeriodError: ``population_too_small``.
    """
    present = Learner.objects.filter(pool=Pool.FEDERATED).count()
    if present > population:
        text = _("population N₀ = %(declared)d is smaller than the %(present)d learners of the federated pool")
        raise PeriodError(text % {"declared": population, "present": present}, code="population_too_small")


def _check_words(words: str) -> None:
    if not words.strip():
        raise PeriodError(_("a reason in words is needed, not an empty one"), code="no_meaning")


def _check_no_round() -> None:
    if AggregationRound.objects.filter(open_slot=1).exists():
        raise PeriodError(_("A round is open: it keeps the period that it began in."), code="round_running")


def _is_open() -> PeriodError:
    return PeriodError(_("A privacy period is open: end it first, with a reason."), code="period_open")


def _record(action: str, period: PrivacyPeriod, actor: str, data: dict[str, Any]) -> None:
    audit.record(
        action=action,
        actor=actor,
        object_type="PrivacyPeriod",
        object_id=str(period.pk),
        data={"period": period.number, **data},
    )
