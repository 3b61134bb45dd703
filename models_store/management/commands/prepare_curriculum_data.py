"""prepare_curriculum_data: set evaluation learners aside, split the curriculum, fit the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.utils.translation import gettext as _

from aivo_site.jobs.job_command import JobCommand
from models_store.tasks import PREPARE_CURRICULUM_DATA


class Command(JobCommand):
    help = "Prepare what the main model learns from: set evaluation learners aside, split by learner, fit the encoder."
    example: ClassVar[str] = "prepare_curriculum_data --json"
    kind: ClassVar[str] = PREPARE_CURRICULUM_DATA
    result_keys: ClassVar[tuple[str, ...]] = (
        "learners", "samples", "categories", "overflow_share", "encoder_sha256", "seconds",
    )  # fmt: skip

    def params(self, options: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def lines(self, result: Mapping[str, Any]) -> list[str]:
        pools = ", ".join(f"{pool} {n}" for pool, n in result["learners"].items())
        lines = [_("Learners: %(pools)s") % {"pools": pools}]
        if result["set_aside"]:
            lines.append(
                _("The evaluation pool was empty: %(n)s curriculum learners were set aside for it, chosen by a hash of their id.")
                % {"n": result["set_aside"]}
            )
        if result["excluded"]:
            reasons = ", ".join(f"{reason} {n}" for reason, n in result["excluded"].items())
            lines.append(_("Curriculum learners left out: %(reasons)s") % {"reasons": reasons})
        lines.append(
            _("%(training_learners)s train, %(validation_learners)s validate: %(samples)s samples, %(categories)s categories, "
              "%(overflow)s of events in the overflow slot.")
            % {**result, "overflow": f"{100 * result['overflow_share']:.2f} %"}
        )  # fmt: skip
        known = _("fitted") if result["created"] else _("had been fitted before: same learners, split and interactions")
        lines.append(_("Encoder %(sha)s: %(known)s.") % {"sha": result["encoder_sha256"][:12], "known": known})
        return lines
