"""run_federated_aggregation: one round, from selecting learners to promotion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import Outcome, ProgressBar
from aivo_site.jobs.job_command import JobCommand
from federation import strategies
from federation.models import ContributionSource, PromotionMode
from federation.rounds import service
from federation.rounds.sharing import AGGREGATION_KIND

FLAGS = {
    "strategy": "strategy",
    "min_learners": "minimum_learners",
    "max_stale_days": "max_stale_days",
    "server_lr": "server_learning_rate",
    "contribution": "contribution_source",
    "promotion": "promotion",
}


class Command(JobCommand):
    help = (
        "Run one federated round: select learners, train or collect their contributions, check and combine them, compare "
        "the new version with the current one on learners outside the round, and promote it if it is better. "
        "Flags override the installation's policy for this round."
    )
    example: ClassVar[str] = "run_federated_aggregation --strategy fedprox --min-learners 5"
    kind: ClassVar[str] = AGGREGATION_KIND
    result_keys: ClassVar[tuple[str, ...]] = (
        "round",
        "state",
        "reason",
        "base_version",
        "candidate_version",
        "eligible",
        "excluded",
        "accepted",
        "rejected",
        "metrics",
        "performance_improvement",
        "privacy",
        "seconds",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument(
            "--dry-run", action="store_true", help=_("say who would take part and who not, and why; change nothing")
        )
        parser.add_argument("--strategy", help=_("one of: %s") % ", ".join(strategies.names()))
        parser.add_argument("--min-learners", type=int, help=_("fewest contributions that make a round"))
        parser.add_argument(
            "--max-stale-days", "--max-stale", type=int, help=_("a learner's last local training may be this old")
        )
        parser.add_argument("--server-lr", "--learning-rate", type=float, help=_("factor of the update"))
        parser.add_argument("--contribution", help=_("one of: %s") % ", ".join(ContributionSource.values))
        parser.add_argument("--promotion", help=_("one of: %s") % ", ".join(PromotionMode.values))
        parser.add_argument("--no-rebase", action="store_true", help=_("do not move learners' models after a promotion"))

    def params(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"overrides": _overrides(options), "dry_run": False, "rebase": not options["no_rebase"]}

    def lines(self, result: Mapping[str, Any]) -> list[str]:
        return _lines(result)

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:
        if options["dry_run"]:
            result = service.aggregate(overrides=_overrides(options), dry_run=True)
            return Outcome(result, _preview_lines(result))
        return super().perform(options, progress)


def _overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the policy that flags set for this round, checked together with it."""
    overrides = {field: options[flag] for flag, field in FLAGS.items() if options[flag] is not None}
    service.policy_with(overrides)
    return overrides


def _preview_lines(result: dict[str, Any]) -> list[str]:
    lines = [
        _("%(n)d learners can take part in a round from %(base)s (at least %(needed)d are needed).")
        % {"n": result["eligible"], "base": result["base_version"], "needed": result["minimum_learners"]}
    ]
    lines += [f"  {learner['learner_id']}: {learner['reason'] or _('eligible')}" for learner in result["learners"]]
    return lines


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = [
        _("Round %(round)d from %(base_version)s: %(state)s%(reason)s")
        % {**result, "reason": f" ({result['reason']})" if result["reason"] else ""},
        _("  eligible %(eligible)d, accepted %(accepted)d, rejected %(rejected)s, left out %(excluded)s") % result,
    ]
    if result["candidate_version"]:
        lines.append(_("  candidate %s") % result["candidate_version"])
    current, candidate = result["metrics"]["current"], result["metrics"]["candidate"]
    if current and candidate:
        lines += [
            f"  {name:<8} {current[name]:.4f} -> {candidate[name]:.4f}  ({candidate[name] - current[name]:+.4f})"
            for name in ("total", "content", "path", "score")
        ]
    if result["performance_improvement"] is not None:
        lines.append(_("  performance improvement %.3f %%") % (100.0 * result["performance_improvement"]))
    if result["privacy"] and result["privacy"].get("statement"):
        lines.append(_("  epsilon %(epsilon).4g, of the period so far %(epsilon_period).4g: %(statement)s") % result["privacy"])
    if result.get("rebase"):
        lines.append(_("  rebased %(rebased)d learners' models, lambda %(by_lambda)s") % result["rebase"])
    return lines
