"""clone_learner_models: give learners their own copy of the main model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import EXIT_DONE, EXIT_FAILED
from aivo_site.errors import UsageError
from aivo_site.jobs.job_command import JobCommand
from learners.models import Pool
from models_store.cloning import check_freeze_layers, learners_to_clone
from models_store.provisioning.decision import check_cloning_allowed
from models_store.tasks import CLONE_LEARNER_MODELS


class Command(JobCommand):
    help = "Give each learner of the federated pool who consents to training a clone of the active main model."
    example: ClassVar[str] = "clone_learner_models --organisation springfield --limit 200"
    kind: ClassVar[str] = CLONE_LEARNER_MODELS
    result_keys: ClassVar[tuple[str, ...]] = ("cloned", "skipped", "failed", "seconds")

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--learner", action="append", default=[], metavar="ID", help=_("only this learner; may be repeated"))
        parser.add_argument("--organisation", default="", metavar="SLUG", help=_("only learners of this organisation"))
        pools = [pool.lower() for pool in Pool.values]
        parser.add_argument("--pool", type=str.lower, choices=pools, default="federated", help=_("learners of this pool"))
        parser.add_argument("--freeze-layers", nargs="+", metavar="LAYER", help=_("layers of the trunk (the version's own)"))
        parser.add_argument("--limit", type=int, help=_("at most so many learners who have no clone yet"))

    def params(self, options: dict[str, Any]) -> dict[str, Any]:
        check_cloning_allowed()
        params: dict[str, Any] = {
            "learner_ids": options["learner"],
            "organisation": options["organisation"],
            "pool": options["pool"].upper(),
            "limit": options["limit"],
        }
        learners_to_clone(**params)
        layers = options["freeze_layers"]
        if layers is not None:
            layers = [name for text in layers for name in text.split(",") if name]
            if not layers:
                raise UsageError(_("--freeze-layers needs at least one layer"))
            check_freeze_layers(layers)
            params["freeze_layers"] = layers
        return params

    def lines(self, result: Mapping[str, Any]) -> list[str]:
        lines = [_("%(cloned)s learners cloned in %(seconds)s s.") % result]
        for title, key in ((_("Left out"), "skipped"), (_("Failed"), "failed")):
            if result[key]:
                lines.append(f"{title}: " + ", ".join(f"{reason} {n}" for reason, n in result[key].items()))
        return lines

    def exit_code(self, result: Mapping[str, Any]) -> int:
        return EXIT_FAILED if result["failed"] else EXIT_DONE
