"""rollback_main_model: make an earlier version active again, with a reason."""

from __future__ import annotations

from typing import ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from federation.management.activation_command import ActivationCommand


class Command(ActivationCommand):
    help = "Make an archived version the active one again. What learners contributed to later versions stays used."
    example: ClassVar[str] = 'rollback_main_model --to aivo-main-v2 --reason "path recommendations got worse"'
    kind: ClassVar[str] = "rollback_main_model"

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--to", dest="version", help=_("an archived version; the parent of the active one when not given"))
