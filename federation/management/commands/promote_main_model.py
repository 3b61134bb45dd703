"""promote_main_model: make a candidate or rejected version active, with a reason."""

from __future__ import annotations

from typing import ClassVar

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from federation.management.activation_command import ActivationCommand


class Command(ActivationCommand):
    help = "Make a version that waits for a decision, or that the gate rejected, the active one. The round keeps its verdict."
    example: ClassVar[str] = 'promote_main_model aivo-main-v3 --reason "reviewed by the data steward"'
    kind: ClassVar[str] = "promote_main_model"

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("version", help=_("name of the version, or its path in the store"))
