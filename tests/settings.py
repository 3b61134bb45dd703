"""Settings of the test suite: the product's own, with every place it writes to inside a temporary folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_FOLDER = Path(tempfile.mkdtemp(prefix="aivo-tests-"))
(_FOLDER / "static").mkdir()

os.environ.setdefault("SECRET_KEY", "only-for-tests-0123456789-abcdefghijklmnopqrstuvwxyz-ABCDEF")
os.environ.setdefault("DATABASE_URL", f"sqlite:///{_FOLDER / 'tests.sqlite3'}")
os.environ["AIVO_MAIN_MODEL_PATH"] = str(_FOLDER / "main-aivo")
os.environ["AIVO_LEARNER_MODELS_PATH"] = str(_FOLDER / "learners")
os.environ["AIVO_STATIC_ROOT"] = str(_FOLDER / "static")
os.environ["ALLOWED_HOSTS"] = "testserver,127.0.0.1,localhost"
os.environ["HTTPS"] = "false"
os.environ["DEBUG"] = "false"
os.environ["USE_FEDERATED_LEARNING"] = "true"

from aivo_site.settings import *  # noqa: E402, F403
from aivo_site.settings import DATABASES, STORAGES  # noqa: E402

STORAGES = {**STORAGES, "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    # A file: in a shared database in memory a second connection (a job's reports) does not wait, it fails at once.
    DATABASES["default"]["TEST"] = {"NAME": str(_FOLDER / "test.sqlite3")}
