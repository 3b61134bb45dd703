"""An installation of its own for a test: database, stores, and real processes of ``manage.py`` on them, which all end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from django.db import connections, models

from aivo_site.environment import BASE_DIR
from tests.site.worker_processes import kill_all

Row = TypeVar("Row", bound=models.Model)

ALIAS = "installation"
"""Database alias under which this process looks into the installation that a test has opened."""

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def object(self) -> dict[str, Any]:
        assert self.out.count("\n") == 1, self.out + self.err
        found: dict[str, Any] = json.loads(self.out)
        return found


class Installation:
    """Everything in ``folder``; the database too where the test run is on SQLite, else one of its own on the same server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._on_sqlite = connections["default"].vendor == "sqlite"
        self._name = str(folder / "db.sqlite3") if self._on_sqlite else f"aivo_faults_{uuid.uuid4().hex[:12]}"
        folder.mkdir(parents=True, exist_ok=True)

    # --- Making and removing it ---------------------------------------------------------------------------------------

    def create(self) -> None:
        """An empty database."""
        if not self._on_sqlite:
            self._on_server(f'CREATE DATABASE "{self._name}"')

    def copy_to(self, folder: Path) -> Installation:
        """Another installation with the same rows and files; nothing may be running on this one."""
        other = Installation(folder)
        if self._on_sqlite:
            with contextlib.closing(sqlite3.connect(self._name)) as mine, contextlib.closing(sqlite3.connect(other._name)) as its:
                mine.backup(its)
        else:
            self._on_server(f'CREATE DATABASE "{other._name}" TEMPLATE "{self._name}"')
        for store in ("main", "learners"):
            if (self.folder / store).is_dir():
                shutil.copytree(self.folder / store, folder / store)
        return other

    def remove(self) -> None:
        if not self._on_sqlite:
            self._on_server(f'DROP DATABASE IF EXISTS "{self._name}" WITH (FORCE)')

    # --- Looking into it ----------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let ``rows`` read this installation's database."""
        config = {**connections["default"].settings_dict, "NAME": self._name}
        connections.databases[ALIAS] = config
        try:
            yield
        finally:
            connections[ALIAS].close()
            del connections[ALIAS]
            del connections.databases[ALIAS]

    def weights(self, version: str) -> bytes:
        """The file with a main version's weights."""
        return (self.folder / "main" / version / "weights.safetensors").read_bytes()

    def files(self) -> dict[str, bytes]:
        """Every file of both stores by its path."""
        found = [path for store in ("main", "learners") for path in (self.folder / store).rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}

    # --- Running things on it -----------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "Q_CLUSTER_NAME"}
        return {
            **kept,
            **dict.fromkeys(_ONE_THREAD, "1"),
            "DJANGO_SETTINGS_MODULE": "tests.faults.settings",
            "DATABASE_URL": self._database_url(),
            "AIVO_MAIN_MODEL_PATH": str(self.folder / "main"),
            "AIVO_LEARNER_MODELS_PATH": str(self.folder / "learners"),
        }

    def run(self, *arguments: str, seconds: float = 120.0) -> Finished:
        """``manage.py`` with these arguments and ``--json``, until it ends."""
        with self.started("manage.py", *arguments, "--json") as process:
            out, err = process.communicate(timeout=seconds)
        return Finished(process.returncode, out.decode(), err.decode())

    def done(self, *arguments: str) -> dict[str, Any]:
        """The object that a command printed, which must have ended with exit code 0."""
        finished = self.run(*arguments)
        assert finished.code == 0, f"{arguments}: exit {finished.code}\n{finished.out}\n{finished.err}"
        return finished.object

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A Python process in a session of its own with its output in pipes; afterwards nothing of its group is left."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=BASE_DIR,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill_all(process)

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[bytes]]:
        """A worker of the training queue, as a user starts it."""
        with (self.folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "manage.py", "worker", "--queue", "training"],
                cwd=BASE_DIR,
                env=self.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            kill_all(process)

    # --- The server ---------------------------------------------------------------------------------------------------

    def _database_url(self) -> str:
        if self._on_sqlite:
            return f"sqlite:///{self._name}"
        config = connections["default"].settings_dict
        login = config["USER"] + (f":{config['PASSWORD']}" if config["PASSWORD"] else "")
        return f"postgres://{login}@{config['HOST'] or '127.0.0.1'}:{config['PORT'] or 5432}/{self._name}"

    def _on_server(self, statement: str) -> None:
        import psycopg

        config = connections["default"].settings_dict
        with psycopg.connect(
            dbname="postgres",
            host=config["HOST"] or "127.0.0.1",
            port=config["PORT"] or 5432,
            user=config["USER"],
            password=config["PASSWORD"] or None,
            autocommit=True,
        ) as server:
            server.execute(statement)


def rows(model: type[Row]) -> models.QuerySet[Row]:
    """All rows of a model in the opened installation."""
    return model._default_manager.using(ALIAS)
