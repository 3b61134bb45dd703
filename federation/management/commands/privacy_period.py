"""privacy_period: begin or end the stretch of time over which ε is composed."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from federation import privacy_periods
from federation.management.fractions import fraction
from federation.privacy_periods import PeriodTerms


class Command(AivoCommand):
    help = (
        "Begin a privacy period, whose population, delta, sampling rate and caps are fixed while it lasts, or end the open one. "
        "ε counts anew in a new period; the lifetime's goes on. Both need a reason, which the audit log keeps."
    )
    example: ClassVar[str] = 'privacy_period begin --population 800 --epsilon-cap 8 --reason "school year 2026"'
    result_keys: ClassVar[tuple[str, ...]] = ("period", "population", "delta", "rate", "expected_cohort", "ended_at")

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("what", choices=("begin", "end"))
        parser.add_argument("--reason", required=True, help=_("what the new period means, or why this one ends, in words"))
        parser.add_argument("--population", type=int, help=_("the most learners there can be while the period lasts"))
        parser.add_argument("--delta", type=float, help=_("below 1/population; default min(1e-5, population^-1.1)"))
        parser.add_argument("--rate", type=fraction, default=Fraction(1), help=_("sampling rate, as 1/10; default 1: everyone"))
        parser.add_argument("--expected-cohort", type=float, help=_("what sums are divided by; default: rate times population"))
        parser.add_argument("--planned-rounds", type=int, default=52, help=_("rounds that noise from a target ε is enough for"))
        parser.add_argument("--epsilon-cap", type=float, help=_("no round runs that would carry ε above it"))
        parser.add_argument("--epsilon-cap-learner", type=float, help=_("no learner takes part whose own ε would rise above it"))

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        actor = "privacy_period"
        if options["what"] == "end":
            period = privacy_periods.end_period(reason=options["reason"], actor=actor)
        else:
            terms = PeriodTerms(
                population=options["population"],
                delta=options["delta"],
                rate=options["rate"],
                expected_cohort=options["expected_cohort"],
                planned_rounds=options["planned_rounds"],
                epsilon_cap=options["epsilon_cap"],
                epsilon_cap_learner=options["epsilon_cap_learner"],
            )
            period = privacy_periods.begin_period(terms=terms, meaning=options["reason"], actor=actor)
        result = {
            "period": period.number,
            "population": period.population,
            "delta": period.delta,
            "rate": str(privacy_periods.rate_of(period)),
            "expected_cohort": privacy_periods.expected_cohort(period),
            "ended_at": period.ended_at,
        }
        line = (
            _("Privacy period %(period)d ended.")
            if period.ended_at
            else _("Privacy period %(period)d: N₀ = %(population)d, δ = %(delta).3g, q = %(rate)s.")
        )
        return Outcome(result, [line % result])
