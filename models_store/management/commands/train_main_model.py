"""train_main_model: train a main model version, and measure it beside every baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.errors import UsageError
from aivo_site.jobs.job_command import JobCommand
from models_store.model_card import figure_rows
from models_store.tasks import TRAIN_MAIN_MODEL


class Command(JobCommand):
    help = (
        "Train the main model on the curriculum pool and measure it on the evaluation pool beside every baseline. "
        "The same data, recipe and seed give one version, however often it is run or interrupted."
    )
    example: ClassVar[str] = "train_main_model --epochs 12 --seed 0"
    kind: ClassVar[str] = TRAIN_MAIN_MODEL
    result_keys: ClassVar[tuple[str, ...]] = (
        "version", "sha256", "metrics", "baselines", "evaluated_on", "by_history", "epochs", "seconds",
    )  # fmt: skip

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--epochs", type=int, default=12, help=_("at most so many; training stops early (12)"))
        parser.add_argument("--batch-size", type=int, default=512, help=_("rows in a step (512)"))
        parser.add_argument("--learning-rate", type=float, default=1e-3, help=_("Adam's at the start (0.001)"))
        parser.add_argument("--seed", type=int, default=0, help=_("of initial weights, order and dropout (0)"))

    def params(self, options: dict[str, Any]) -> dict[str, Any]:
        rate = options["learning_rate"]
        for name, least in (("epochs", 1), ("batch_size", 2), ("seed", 0)):
            if options[name] < least:
                flag = f"--{name.replace('_', '-')}"
                message = _("%(flag)s must be at least %(least)s, not %(value)s")
                raise UsageError(message % {"flag": flag, "least": least, "value": options[name]})
        if not (math.isfinite(rate) and rate > 0.0):
            raise UsageError(_("--learning-rate must be positive, not %(value)s") % {"value": rate})
        return {
            "epochs": options["epochs"],
            "batch_size": options["batch_size"],
            "learning_rate": rate,
            "seed": options["seed"],
        }

    def lines(self, result: Mapping[str, Any]) -> list[str]:
        head = _("%(version)s (%(status)s), %(epochs)s epochs") % result
        if not result["created"]:
            head += _(": trained before with the same data, recipe and seed; nothing was done")
        elif result["resumed_from"]:
            head += _(", gone on from epoch %(epoch)s") % {"epoch": result["resumed_from"]}
        on = result["evaluated_on"]
        lines = [
            head,
            _("Measured on the later 30 %% of %(learners)s learners it never saw (%(samples)s samples):") % on,
        ]
        rows = figure_rows(result["metrics"], result["baselines"])
        width = max(len(name) for _head, name, _figures in rows)
        lines += [f"  {part:<11} {name:<{width}}  {figures}" for part, name, figures in rows]
        return [*lines, *result["notes"]]
