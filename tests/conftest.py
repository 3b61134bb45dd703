"""Fixtures that every part of the suite uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import Settings
from django.core.files.storage import storages


@pytest.fixture(autouse=True)
def own_stores(tmp_path: Path, settings: Settings) -> Iterator[None]:
    """Each test writes models into a folder of its own."""
    options = dict(settings.STORAGES)
    for alias in ("main_models", "learner_models"):
        options[alias] = {
            "BACKEND": "django.core.files.storage.FileSystemStorage",
            "OPTIONS": {"location": str(tmp_path / alias)},
        }
    settings.STORAGES = options
    for alias in ("main_models", "learner_models"):
        storages._storages.pop(alias, None)  # type: ignore[attr-defined]
    yield
