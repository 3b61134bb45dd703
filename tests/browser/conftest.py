"""A real installation for browser tests: its own database, web server and two workers, filled by a small demo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

REPOSITORY = Path(__file__).resolve().parents[2]
PASSWORD = "browser-tests-only-password"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@dataclass(frozen=True)
class Installation:
    """Where the server answers and the environment its commands run in."""

    url: str
    env: dict[str, str]

    def manage(self, *arguments: str) -> str:
        """Run a management command and return its standard output."""
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments], cwd=REPOSITORY, env=self.env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIVO_", "DJANGO_"))}
    return {
        **kept,
        "SECRET_KEY": "browser-tests-only-0123456789-abcdefghijklmnopqrstuvwxyz",
        "DATABASE_URL": f"sqlite:///{folder / 'db.sqlite3'}",
        "AIVO_MAIN_MODEL_PATH": str(folder / "main-aivo"),
        "AIVO_LEARNER_MODELS_PATH": str(folder / "learners"),
        "AIVO_STATIC_ROOT": str(folder / "static"),
        "ALLOWED_HOSTS": "127.0.0.1",
        "HTTPS": "false",
        "USE_FEDERATED_LEARNING": "true",
        "DJANGO_SUPERUSER_PASSWORD": PASSWORD,
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("installation")
    env = _environment(folder)
    port = _free_port()
    house = Installation(url=f"http://127.0.0.1:{port}", env=env)
    house.manage("migrate", "--verbosity", "0")
    house.manage("collectstatic", "--noinput", "--verbosity", "0")
    house.manage("demo", "--size", "small", "--json")
    if json.loads(house.manage("federation_status", "--json"))["active_version"] == "aivo-main-v1":
        # Learners' keys are random, so the gate's verdict on the small demo is not certain; the tests need two versions.
        house.manage("promote_main_model", "aivo-main-v2", "--reason", "the browser tests need an archived version")
    house.manage("createsuperuser", "--noinput", "--username", "operator", "--email", "operator@example.org")
    web = [sys.executable, "-m", "gunicorn", "aivo_site.wsgi:application", "--bind", f"127.0.0.1:{port}", "--threads", "4"]
    commands = [
        web,
        [sys.executable, "manage.py", "worker", "--queue", "default"],
        [sys.executable, "manage.py", "worker", "--queue", "training"],
    ]
    log = (folder / "processes.log").open("wb")
    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        for command in commands
    ]
    try:
        _wait_until_it_answers(house.url)
        yield house
    finally:
        for process in processes:
            _end(process)
        log.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("browser tests need the system's chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, installation: Installation) -> Iterator[Page]:
    """A signed-in page; any console error, failed request or policy violation fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, base_url=installation.url)
    tab = context.new_page()
    tab.set_default_timeout(15_000)
    faults: list[str] = []
    tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    tab.on("response", lambda answer: faults.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.goto("/admin/login/")
    tab.fill("input[name=username]", "operator")
    tab.fill("input[name=password]", PASSWORD)
    tab.click("button[type=submit]")
    tab.wait_for_url("**/admin/")
    yield tab
    context.close()
    assert not faults, faults


def _wait_until_it_answers(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/admin/login/", timeout=5)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)
        else:
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything it started."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
