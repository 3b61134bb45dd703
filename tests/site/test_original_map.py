"""docs/original-map.md names only what exists, and everything that the original's code names."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from django.core.management import get_commands
from django.db import models

from aivo_site.environment import NAMES
from tests.shared import SHARED

REPOSITORY = Path(__file__).resolve().parents[2]
MAP = REPOSITORY / "docs" / "original-map.md"
ORIGINAL = SHARED / "original" / "federated-learning-for-aivo-v5.md"
ROOTS = ("aivo_core", "aivo_site", "learners", "models_store", "federation")

DOTTED = re.compile(r"(?P<path>[a-zA-Z_][\w.]*)(?:\((?P<names>[\w, ]+)\))?")


@dataclass(frozen=True)
class MapRow:
    """One row of the document's tables: the original's cell, and the code spans of the next two."""

    original: str
    here: tuple[str, ...]
    tests: tuple[str, ...]
    difference: str


@cache
def rows() -> tuple[MapRow, ...]:
    found = []
    for line in MAP.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells or cells[0] in ("original", "---"):
            continue
        assert len(cells) == 4, f"a row needs four cells: {line}"
        found.append(MapRow(cells[0], spans(cells[1]), spans(cells[2]), cells[3]))
    return tuple(found)


def spans(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def problem(name: str) -> str:
    """What is wrong with a name of the column "here"; empty if it exists."""
    if name.startswith("manage.py "):
        return "" if name.removeprefix("manage.py ") in get_commands() else f"no command {name}"
    if re.fullmatch(r"[A-Z][A-Z_]+", name):
        return "" if name in NAMES else f"no environment variable {name}"
    if (REPOSITORY / name).is_file():
        return ""
    match = DOTTED.fullmatch(name)
    if match is None or match["path"].split(".")[0] not in ROOTS:
        return f"{name} is neither a command, a variable, a file nor a dotted name"
    try:
        target = resolve(match["path"])
    except (ImportError, AttributeError) as error:
        return f"{name}: {error}"
    missing = set((match["names"] or "").replace(" ", "").split(",")) - {""} - members(target)
    return f"{name}: no {', '.join(sorted(missing))}" if missing else ""


def resolve(path: str) -> Any:
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            target: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:length]).startswith(error.name or " "):
                raise
            continue
        for part in parts[length:]:
            target = getattr(target, part)
        return target
    raise ImportError(f"no module {path}")


def members(target: Any) -> set[str]:
    """Fields of a model or dataclass, parameters of anything that can be called."""
    if inspect.isclass(target) and issubclass(target, models.Model):
        return {field.name for field in target._meta.get_fields()}
    if dataclasses.is_dataclass(target):
        return {field.name for field in dataclasses.fields(target)}
    return set(inspect.signature(target).parameters) if callable(target) else set()


@cache
def functions_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def missing_test(reference: str) -> str:
    """What is wrong with a name of the column "test"; empty if it exists."""
    file, _, name = reference.partition("::")
    path = REPOSITORY / "tests" / (file or "test_original_interface.py")
    if not path.is_file():
        return f"no file tests/{file}"
    return "" if name in functions_of(path) else f"no test {reference}"


def identifiers(text: str) -> Iterator[str]:
    """Names of the product in the original's code: in camelCase, PascalCase or capitals, with what they are named by."""
    for block in re.findall(r"```(?:typescript|prisma|bash)\n(.*?)```", text, flags=re.DOTALL):
        without_comments = re.sub(r"(//|^\s*#).*$", "", block, flags=re.MULTILINE)
        yield from re.findall(r"\b(?:[a-z]+[A-Z]\w*|[A-Z][a-z]+[A-Z]\w*|AIVO\w+|[A-Z]+_[A-Z_]+)\b", without_comments)
        yield from re.findall(r"^\s+(\w+)\s+(?:String|Int|Float|Json|DateTime|Boolean)\b", without_comments, flags=re.MULTILINE)


OF_THE_LANGUAGE = {"toFixed", "updatedAt", "DateTime", "forEach"}
OF_THE_EXAMPLES = {"trainingData", "cloneInfo", "aggregationResult"}
"""Local variables of the original's examples."""


def test_the_map_has_a_row_for_each_part_of_the_original() -> None:
    headings = re.findall(r"^## (.+)$", MAP.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows()) > 100 and len(headings) >= 12


def test_every_name_in_the_map_exists() -> None:
    assert [text for row in rows() for name in row.here if (text := problem(name))] == []


def test_every_test_in_the_map_exists() -> None:
    assert [text for row in rows() for name in row.tests if (text := missing_test(name))] == []


def test_a_row_without_a_test_says_why() -> None:
    silent = [row.original for row in rows() if not row.tests and not re.search(r"\*\*not yet\*\*|not claimed", row.difference)]
    assert silent == []


@pytest.mark.parametrize(
    "name",
    [
        "models_store.cloning.NoSuchCloner",
        "models_store.no_such_module.Thing",
        "models_store.cloning.ModelCloner.clone_model(no_such_argument)",
        "models_store.models.PersonalizedModel(no_such_field)",
        "manage.py no_such_command",
        "NO_SUCH_VARIABLE",
        "docs/no-such-file.md",
    ],
)
def test_the_check_notices_a_name_that_does_not_exist(name: str) -> None:
    assert problem(name)


def test_the_check_notices_a_test_that_does_not_exist() -> None:
    assert missing_test("::test_that_nobody_wrote") and missing_test("no_such_file.py::test_x")
    assert not missing_test("site/test_original_map.py::test_every_name_in_the_map_exists")


@pytest.mark.skipif(not ORIGINAL.is_file(), reason="the original document is not beside the checkout")
def test_every_identifier_of_the_originals_code_has_a_row() -> None:
    named = " ".join(row.original for row in rows())
    words = set(re.findall(r"\w+", named))
    found = set(identifiers(ORIGINAL.read_text(encoding="utf-8")))
    assert len(found) > 60
    assert sorted(found - words - OF_THE_LANGUAGE - OF_THE_EXAMPLES) == []
