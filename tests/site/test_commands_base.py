"""The common ground of commands: exit codes, streams, and exactly one JSON object."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import numpy as np
import pytest
from django.core.management.base import CommandError, CommandParser
from django.utils import timezone
from django.utils.translation import gettext_lazy

from aivo_core.network import NetworkError
from aivo_site.commands import AivoCommand, Outcome, ProgressBar
from aivo_site.errors import DomainError, Skipped, UsageError

ID = UUID("6f1f0b3c-6a0f-4a53-9a77-0d6f3f0f0a01")


class Probe(AivoCommand):
    """Does what the test says."""

    result_keys: ClassVar[tuple[str, ...]] = ("round", "state", "seconds")
    example: ClassVar[str] = "probe --times 2"
    action: ClassVar[Callable[[], Outcome]]

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--times", type=int, default=1)

    def perform(self, options: dict[str, Any], progress: ProgressBar) -> Outcome:
        return type(self).action()


class Ran:
    """Exit code and both streams of one run from the command line."""

    def __init__(self, action: Callable[[], Outcome], *arguments: str) -> None:
        Probe.action = staticmethod(action)
        out, err = io.StringIO(), io.StringIO()
        self.exit_code: Any = 0
        try:
            Probe(stdout=out, stderr=err).run_from_argv(["manage.py", "probe", "--skip-checks", *arguments])
        except SystemExit as end:
            self.exit_code = end.code
        self.out, self.err = out.getvalue(), err.getvalue()

    @property
    def object(self) -> dict[str, Any]:
        assert self.out.count("\n") == 1
        loaded: dict[str, Any] = json.loads(self.out)
        return loaded


def refuse(error: Exception) -> Callable[[], Outcome]:
    def action() -> Outcome:
        raise error

    return action


def test_json_is_one_object_with_null_for_what_does_not_exist() -> None:
    ran = Ran(lambda: Outcome({"state": "PROMOTED", "more": 1}, ["a line"]), "--json")
    assert (ran.exit_code, ran.err) == (0, "")
    assert ran.object == {"round": None, "state": "PROMOTED", "seconds": None, "more": 1}


def test_without_json_the_lines_go_to_standard_output() -> None:
    ran = Ran(lambda: Outcome({"state": "PROMOTED"}, ["one", "two"]))
    assert (ran.exit_code, ran.out, ran.err) == (0, "one\ntwo\n", "")


def test_an_outcome_chooses_its_own_exit_code_and_still_prints() -> None:
    ran = Ran(lambda: Outcome({"state": "x"}, exit_code=1), "--json")
    assert (ran.exit_code, ran.object["state"]) == (1, "x")


@pytest.mark.parametrize(
    ("error", "exit_code", "code"),
    [
        (DomainError("it was refused", code="no_main_model"), 1, "no_main_model"),
        (NetworkError("freeze_layers is no prefix", code="bad_freeze_list"), 1, "bad_freeze_list"),
        (FileNotFoundError(2, "No such file", "x.csv"), 1, "file_not_found"),
        (Skipped("too few learners", code="too_few"), 3, "too_few"),
    ],
)
def test_a_refusal_is_told_on_both_streams(error: Exception, exit_code: int, code: str) -> None:
    ran = Ran(refuse(error), "--json")
    assert ran.exit_code == exit_code
    assert ran.object == {"round": None, "state": None, "seconds": None, "error": {"code": code, "message": str(error)}}
    assert str(error) in ran.err and "Traceback" not in ran.err
    plain = Ran(refuse(error))
    assert (plain.exit_code, plain.out) == (exit_code, "")
    assert str(error) in plain.err


def test_a_refusal_may_carry_what_was_found_until_then() -> None:
    error = Skipped("nothing new")
    error.result = {"round": 7}  # type: ignore[attr-defined]
    assert Ran(refuse(error), "--json").object["round"] == 7


@pytest.mark.parametrize("arguments", [("--json",), ()])
def test_wrong_usage_exits_2_and_prints_no_object(arguments: tuple[str, ...]) -> None:
    ran = Ran(refuse(UsageError("--strategy must be one of a, b")), *arguments)
    assert (ran.exit_code, ran.out) == (2, "")
    assert "--strategy must be one of a, b" in ran.err


def test_an_unknown_flag_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(lambda: Outcome({}), "--nope").exit_code == 2
    assert "--nope" in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback_and_the_json_contract(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    Probe.action = staticmethod(refuse(ZeroDivisionError("by zero")))
    with pytest.raises(ZeroDivisionError):
        Probe(stdout=out).run_from_argv(["manage.py", "probe", "--skip-checks", "--json"])
    assert json.loads(out.getvalue())["error"] == {"code": "unexpected_error", "message": "by zero"}
    with pytest.raises(ValueError, match="bare"):
        Probe.action = staticmethod(refuse(ValueError("bare")))
        Probe(stdout=io.StringIO()).run_from_argv(["manage.py", "probe", "--skip-checks"])


def test_a_command_error_of_django_passes_unchanged() -> None:
    ran = Ran(refuse(CommandError("stop", returncode=4)), "--json")
    assert (ran.exit_code, ran.out) == (4, "")


def test_what_a_library_prints_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    def noisy() -> Outcome:
        sys.stdout.write("noise\n")
        return Outcome({"state": "done"})

    out = io.StringIO()
    Probe.action = staticmethod(noisy)
    Probe(stdout=out).run_from_argv(["manage.py", "probe", "--skip-checks", "--json"])
    assert json.loads(out.getvalue())["state"] == "done"
    seen = capsys.readouterr()
    assert seen.out == "" and "noise" in seen.err


def test_ids_times_paths_and_numpy_numbers_have_a_json_form() -> None:
    now = timezone.now()
    result = {
        "round": ID,
        "state": gettext_lazy("done"),
        "seconds": np.float32(1.5),
        "count": np.int64(3),
        "at": now,
        "on": now.date(),
        "path": Path("a/b"),
    }
    told = Ran(lambda: Outcome(result), "--json").object
    assert told == {
        "round": str(ID),
        "state": "done",
        "seconds": 1.5,
        "count": 3,
        "at": now.isoformat(),
        "on": now.date().isoformat(),
        "path": "a/b",
    }


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf")])
def test_a_figure_that_is_not_finite_is_a_fault_and_never_printed(value: float) -> None:
    out = io.StringIO()
    Probe.action = staticmethod(lambda: Outcome({"seconds": value}))
    with pytest.raises(ValueError, match="JSON"):
        Probe(stdout=out).run_from_argv(["manage.py", "probe", "--skip-checks", "--json"])
    told = json.loads(out.getvalue())
    assert told["seconds"] is None and told["error"]["code"] == "unexpected_error"


def test_help_shows_the_example() -> None:
    assert "python manage.py probe --times 2" in Probe().create_parser("manage.py", "probe").format_help()


def test_the_progress_bar_draws_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        monkeypatch.setattr("sys.stderr", stream)
        ProgressBar(enabled=True)(3, 3, "learner")
        ProgressBar(enabled=False)(3, 3, "learner")
    assert terminal.getvalue().count("3/3 learner") == 1
    assert file.getvalue() == ""
