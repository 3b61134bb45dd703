"""Write the interactions of simulated learners as a canonical CSV file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser
from django.utils.translation import gettext as _

from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from aivo_site.errors import UsageError
from learners.simulated_csv import write_simulated_csv
from learners.simulator import Simulator


class Command(AivoCommand):
    help = _("Write the interactions of simulated learners as a canonical CSV file, plain or gzip by its name.")
    example = "simulate_learners --learners 60 --events 150 --seed 1 --out simulated.csv.gz"
    result_keys = ("file", "learners", "rows", "mean_score", "seconds")

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--learners", type=int, default=100, help=_("how many (default 100)"))
        parser.add_argument("--events", type=int, default=150, help=_("events per learner on average (default 150)"))
        parser.add_argument("--seed", type=int, default=0, help=_("other seeds give other learners (default 0)"))
        parser.add_argument("--prefix", default="sim", help=_("how the learner ids begin (default sim)"))
        parser.add_argument("--out", type=Path, required=True, help=_("file to write; .gz is compressed"))

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:
        started = time.monotonic()
        out: Path = options["out"]
        if not out.parent.is_dir():
            raise UsageError(_("--out must name a file in a folder that exists, not %(path)s.") % {"path": out})
        if options["events"] < 2:
            raise UsageError(_("--events must be at least 2, not %(events)d.") % {"events": options["events"]})
        try:
            simulator = Simulator(options["seed"], learners=options["learners"], prefix=options["prefix"])
        except ValueError as error:
            raise UsageError(str(error)) from error
        written = write_simulated_csv(simulator=simulator, events=options["events"], path=out, progress=progress)
        seconds = round(time.monotonic() - started, 3)
        result = {
            "file": str(out),
            "learners": simulator.size,
            "rows": written.rows,
            "mean_score": round(written.mean_score, 4),
            "seconds": seconds,
        }
        line = _("%(rows)d rows of %(learners)d simulated learners written to %(file)s (mean score %(mean_score).2f)") % result
        return Outcome(result, [line])
