"""The whole pipeline on simulated learners, then a table of what happened."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from aivo_site.console.demo import SIZES, DemoReport, run_demo


class Command(AivoCommand):
    help = _("Fill an empty installation with simulated learners and run the whole pipeline on them; safe to run again.")
    example = "demo"
    result_keys = ("versions", "learners", "sessions", "rounds", "active_version", "admin_user", "seconds")

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--size", choices=sorted(SIZES), default="normal", help=_("small is for tests of the installation"))

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:
        report = run_demo(size=SIZES[options["size"]], say=_say, progress=progress)
        return Outcome(asdict(report), _table(report))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(report: DemoReport) -> list[str]:
    main = report.steps["train_main_model"]
    personal = report.steps["train_learner_models"].get("evaluation") or {}
    lines = ["", _("What happened"), "-" * 72]
    lines += _main_lines(main)
    if personal:
        lines.append(
            _("own models       %(n)s learners; served by: %(choices)s")
            % {"n": personal["learners"], "choices": _counts(personal["serving_choice"])}
        )
    for row in report.rounds:
        improvement = row["performance_improvement"]
        change = (
            _("; loss of held-out learners fell by %(share).2f %%") % {"share": 100 * improvement}
            if improvement is not None
            else ""
        )
        lines.append(_("round %(n)-10s %(state)s%(change)s") % {"n": row["round"], "state": row["state"], "change": change})
    lines.append(
        _("versions         %(versions)s")
        % {"versions": ", ".join(f"{row['version']} {row['status']}" for row in report.versions)}
    )
    lines.append(_("learners         %(n)s simulated, %(s)s training sessions") % {"n": report.learners, "s": report.sessions})
    lines.append(_("seconds          %(seconds).0f") % {"seconds": report.seconds})
    lines.append("-" * 72)
    if report.admin_password:
        lines.append(
            _("Administrator: %(user)s, password: %(password)s") % {"user": report.admin_user, "password": report.admin_password}
        )
        lines.append(_("The password is shown this once; change it in the console."))
    else:
        lines.append(
            _("Administrator: %(user)s (password set earlier; `python manage.py changepassword %(user)s` sets a new one)")
            % {"user": report.admin_user}
        )
    return lines


def _main_lines(main: dict[str, Any]) -> list[str]:
    metrics, baselines = main["metrics"], main["baselines"]
    content = metrics["content"]
    best = min((figures["content"]["log_loss"] for figures in baselines.values() if "content" in figures), default=None)
    lines = [
        _("main model       next category right %(top1).1f %%, log loss %(loss).3f (best simple rule: %(best)s)")
        % {"top1": 100 * content["top1"], "loss": content["log_loss"], "best": f"{best:.3f}" if best else "-"}
    ]
    score = metrics["difficulty"]
    lines.append(
        _("success curve    AUC %(auc).3f, mean calibration gap %(gap).3f")
        % {"auc": score["auc"], "gap": score["calibration_gap"]}
    )
    return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
