"""What every command owes: a test, an example that can be typed, the keys of the JSON contract, a refusal for what it takes."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from django.apps import apps
from django.core.management import get_commands, load_command_class

from aivo_site.commands import AivoCommand
from aivo_site.environment import BASE_DIR
from tests.site.test_command_refusals import FAILURE_CASES, USAGE_CASES

CONTRACT = {
    "import_interactions": (
        "rows_read", "rows_imported", "rows_duplicate", "rows_rejected", "rejected_by_reason", "learners", "consented",
        "rejects_file", "seconds",
    ),
    "prepare_curriculum_data": ("learners", "samples", "categories", "overflow_share", "encoder_sha256", "seconds"),
    "train_main_model": ("version", "sha256", "metrics", "baselines", "evaluated_on", "by_history", "epochs", "seconds"),
    "clone_learner_models": ("cloned", "skipped", "failed", "seconds"),
    "train_learner_models": (
        "trained", "skipped", "failed", "engine", "backend", "evaluation", "learners_per_second", "seconds",
    ),
    "run_federated_aggregation": (
        "round", "state", "reason", "base_version", "candidate_version", "eligible", "excluded", "accepted", "rejected",
        "metrics", "performance_improvement", "privacy", "seconds",
    ),
    "federation_status": (
        "active_version", "main_versions", "learners", "active_learner_models", "sessions", "total_federated_updates",
        "average_performance", "rounds", "last_round", "privacy", "jobs",
    ),
    "verify_store": ("files", "missing", "corrupt", "orphaned", "active_pointer"),
    "privacy_report": (
        "entries", "epsilon_federation", "epsilon_learner_max", "delta", "forecast", "self_test", "verified",
    ),
    "demo": ("versions", "learners", "sessions", "rounds", "active_version", "admin_user", "seconds"),
}  # fmt: skip
"""Keys that the JSON object of a command has, whatever else it has; never renamed."""

NOT_YET: set[str] = set()
"""Commands of the contract that do not exist so far; each must leave this set when it is written."""


@cache
def own_commands() -> dict[str, AivoCommand]:
    """The product's commands by name."""
    labels = {config.name: config for config in apps.get_app_configs()}
    own = {}
    for name, app in get_commands().items():
        config = labels.get(str(app))
        if config is not None and Path(config.path).is_relative_to(BASE_DIR) and ".venv" not in config.path:
            command = load_command_class(str(app), name)
            assert isinstance(command, AivoCommand), f"{name} is not built on AivoCommand"
            own[name] = command
    return own


RUNNERS = {"call_command", "done", "manage", "run", "run_json", "started"}
"""Functions of the test suite that run a command named by one of their arguments."""


@cache
def commands_run_by_tests() -> frozenset[str]:
    """The names given to ``RUNNERS``, or after ``manage.py`` in a list; the table of refusals does not count."""
    found: set[str] = set()
    for file in (BASE_DIR / "tests").rglob("*.py"):
        if file.name in (Path(__file__).name, "test_command_refusals.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _called(node.func) in RUNNERS:
                found.update(_strings(node.args[:3]))
            elif isinstance(node, ast.List) and "manage.py" in _strings(node.elts):
                found.update(_strings(node.elts))
    return frozenset(found)


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _strings(nodes: Sequence[ast.expr]) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


COMMANDS = sorted(own_commands())


def test_the_commands_are_found() -> None:
    assert {"train_main_model", "run_federated_aggregation", "import_interactions", "worker", "demo"} <= set(COMMANDS)
    assert "migrate" not in COMMANDS and "qcluster" not in COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_test(name: str) -> None:
    assert name in commands_run_by_tests(), f"no test names the command {name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_the_command_accepts(name: str) -> None:
    command = own_commands()[name]
    parser = command.create_parser("manage.py", name)
    shown = parser.format_help()
    assert f"Example: python manage.py {command.example}" in shown
    assert command.help and "--json" in shown
    first, *arguments = shlex.split(command.example)
    assert first == name
    parser.parse_args(arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name: str) -> None:
    parser = own_commands()[name].create_parser("manage.py", name)
    silent = [action.dest for action in parser._actions if action.option_strings and not action.help and not action.choices]
    assert silent == []


@pytest.mark.parametrize("name", CONTRACT)
def test_the_json_object_has_the_keys_of_the_contract(name: str) -> None:
    if name in NOT_YET:
        assert name not in COMMANDS, f"{name} exists now: take it out of NOT_YET"
        return
    assert set(CONTRACT[name]) <= set(own_commands()[name].result_keys)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_takes_something_has_a_refusal(name: str) -> None:
    common = {action.dest for action in AivoCommand().create_parser("manage.py", "any")._actions} | {"inline", "background"}
    parser = own_commands()[name].create_parser("manage.py", name)
    taken = {action.dest for action in parser._actions if action.nargs != 0} - common
    refused = {arguments[0] for arguments, *_rest in (*USAGE_CASES.values(), *FAILURE_CASES.values())}
    assert not taken or name in refused, f"{name} takes {sorted(taken)}, and no bad value of it is tested"
