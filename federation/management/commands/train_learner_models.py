"""train_learner_models: train learners' own models on what they did, and decide what serves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import EXIT_DONE, EXIT_FAILED
from aivo_site.jobs.job_command import JobCommand
from federation.local_training import learners_to_train, training_policy
from federation.models import Adaptation
from federation.tasks import TRAIN_LEARNER_MODELS

OVERRIDES = {
    "engine": "engine", "epochs": "local_epochs", "batch_size": "batch_size", "learning_rate": "learning_rate",
    "adaptation": "adaptation",
}  # fmt: skip
"""Option and field of the policy that it sets for this run."""


class Command(JobCommand):
    help = (
        "Train the own model of each learner who has a clone and consents to training, on the earlier 70 % of what they did; "
        "compare it with main on the later 30 %. A learner whose own model is not better is served by main. "
        "Learners with nothing new are left out, so that it can be run again and again."
    )
    example: ClassVar[str] = "train_learner_models --organisation springfield --limit 200"
    kind: ClassVar[str] = TRAIN_LEARNER_MODELS
    result_keys: ClassVar[tuple[str, ...]] = (
        "trained", "skipped", "failed", "engine", "backend", "evaluation", "learners_per_second", "seconds",
    )  # fmt: skip

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--learner", action="append", default=[], metavar="ID", help=_("only this learner; may be repeated"))
        parser.add_argument("--organisation", default="", metavar="SLUG", help=_("only learners of this organisation"))
        parser.add_argument("--limit", type=int, help=_("at most so many learners, those trained longest ago"))
        parser.add_argument("--force", action="store_true", help=_("also learners with nothing new to train on"))
        parser.add_argument("--engine", help=_("cohort or keras, the reference (default: the policy's)"))
        parser.add_argument("--epochs", type=int, help=_("local epochs (the policy's, 5)"))
        parser.add_argument("--batch-size", type=int, help=_("(the policy's, 32)"))
        parser.add_argument("--learning-rate", type=float, help=_("of the tail (the policy's, 0.001)"))
        parser.add_argument("--adaptation", metavar="|".join(Adaptation.values), help=_("what is trained (the policy's)"))

    def params(self, options: dict[str, Any]) -> dict[str, Any]:
        chosen = {
            "learner_ids": options["learner"],
            "organisation": options["organisation"],
            "limit": options["limit"],
        }
        learners_to_train(**chosen)
        overrides = {field: options[name] for name, field in OVERRIDES.items() if options[name] is not None}
        training_policy(overrides)
        return {**chosen, "overrides": overrides, "force": options["force"]}

    def lines(self, result: Mapping[str, Any]) -> list[str]:
        lines = [
            _("%(trained)d learners trained with %(engine)s (%(backend)s) in %(seconds).1f s") % result,
            *(
                f"{title}: " + ", ".join(f"{reason} {n}" for reason, n in result[key].items())
                for title, key in ((_("Left out"), "skipped"), (_("Failed"), "failed"))
                if result[key]
            ),
        ]
        evaluation = result["evaluation"]
        if not evaluation["learners"]:
            return lines
        lines.append(
            _("Against main on the later interactions of %(n)d learners, which nothing was trained on (negative is better):")
            % {"n": evaluation["learners"]}
        )
        lines += [_change_line(_("served, %s") % head, change) for head, change in evaluation["heads"].items()]
        lines.append(_change_line(_("own model unblended, total"), evaluation["personal"]["total"]))
        if evaluation["control"]:
            lines.append(_change_line(_("another learner's model, total"), evaluation["control"]["total"]))
        choices = ", ".join(f"{choice} {n}" for choice, n in evaluation["serving_choice"].items())
        return [*lines, _("Served by: %s") % choices]

    def exit_code(self, result: Mapping[str, Any]) -> int:
        return EXIT_FAILED if result["failed"] else EXIT_DONE


def _change_line(title: str, change: Mapping[str, Any]) -> str:
    low, high = change["interval"]
    return _(
        "  %(title)-32s %(mean)+.4f [%(low)+.4f, %(high)+.4f]  better %(better)3.0f %%  worse %(worse)3.0f %%  worst %(worst)+.3f"
    ) % {
        "title": title,
        "mean": change["mean"],
        "low": low,
        "high": high,
        "better": 100 * change["better"],
        "worse": 100 * change["worse"],
        "worst": change["worst"],
    }
