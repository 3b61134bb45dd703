"""privacy_report: how much privacy was spent, what that means, and whether it is true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import EXIT_DONE, EXIT_FAILED, AivoCommand, Outcome, ProgressBar
from federation.management.fractions import fraction
from federation.privacy_reporting import Calibrate, privacy_report


class Command(AivoCommand):
    help = (
        "Say how much privacy the rounds have spent, for whom and against whom, and how many rounds are left. "
        "Exits 1 where the ledger does not verify or the self-test fails."
    )
    example: ClassVar[str] = "privacy_report --verify --self-test"
    result_keys: ClassVar[tuple[str, ...]] = (
        "entries",
        "epsilon_federation",
        "epsilon_learner_max",
        "delta",
        "forecast",
        "self_test",
        "verified",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--verify", action="store_true", help=_("compute every entry of the ledger again and compare"))
        parser.add_argument(
            "--self-test", action="store_true", help=_("check the noise, bounds and figures of this installation")
        )
        parser.add_argument("--forecast", action="store_true", help=_("say how many more rounds fit under the cap"))
        parser.add_argument("--calibrate", type=float, nargs="+", metavar="EPS", help=_("smallest noise multiplier for each ε"))
        parser.add_argument("--rounds", type=int, help=_("rounds to calibrate for; default: the period's planned rounds"))
        parser.add_argument("--population", type=int, help=_("learners to calibrate for; default: the period's population"))
        parser.add_argument("--rate", type=fraction, help=_("sampling rate to calibrate for, as 1/10; default: the period's"))

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:  # noqa: ARG002
        question = None
        if options["calibrate"]:
            question = Calibrate(options["calibrate"], options["rounds"], options["population"], options["rate"])
        result = privacy_report(with_self_test=options["self_test"], with_verification=options["verify"], calibrate=question)
        failed = result["verified"] is False or bool(result["self_test"] and result["self_test"]["failed"])
        return Outcome(result, _lines(result, forecast=options["forecast"]), EXIT_FAILED if failed else EXIT_DONE)


def _lines(result: Mapping[str, Any], *, forecast: bool) -> list[str]:
    lines = [_("%d charges in the ledger.") % result["entries"]]
    if result["period"] is None:
        lines.append(_("No privacy period is open: no round is differentially private."))
    lines += dict.fromkeys(statement["text"] for statement in result["statements"])  # with q = 1 both say the same
    if result["epsilon_lifetime"] is not None:
        lines.append(_("Over all periods: ε = %.4g.") % result["epsilon_lifetime"])
    if forecast:
        lines.append(
            result["forecast"]["text"]
            if result["forecast"]
            else _("No forecast: there is no cap, or no policy with differential privacy.")
        )
    for entry in result["calibration"] or ():
        text = _(
            "ε = %(target)g over %(rounds)d rounds at rate %(rate)s: noise multiplier %(noise_multiplier).4f (ε = %(epsilon).4f)"
        )
        lines.append(text % entry)
    if result["verification"] is not None:
        lines.append(_("The ledger verifies.") if result["verified"] else _("The ledger does not verify:"))
        lines += [f"  {problem['message']}" for problem in result["verification"]["problems"]]
    if result["self_test"] is not None:
        checks = result["self_test"]["checks"]
        lines.append(
            _("Self-test: %(n)d checks, %(failed)d failed.") % {"n": len(checks), "failed": result["self_test"]["failed"]}
        )
        lines += [
            f"  {check['name']}: {check['measured']:.6g} not in [{check['low']:.6g}, {check['high']:.6g}]"
            for check in checks
            if not check["passed"]
        ]
    lines += [_("Not covered by noise:"), *(f"  {entry['what']} ({entry['seen_by']})" for entry in result["unnoised"])]
    return lines
