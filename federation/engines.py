"""The engines of local training by name."""

from __future__ import annotations

import threading
from collections.abc import Callable

from django.conf import settings
from django.utils.translation import gettext as _

from aivo_core.engine.cohort import CohortEngine
from aivo_core.engine.contract import LocalTrainingEngine
from aivo_site.errors import UsageError


class EngineUnavailable(UsageError):
    """No engine of that name here; the message names those there are."""

    default_code = "engine_unavailable"


def available_engines() -> tuple[str, ...]:
    """The names that ``get_engine`` knows."""
    return tuple(_FACTORIES)


def check_engine(name: str) -> None:
    """Refuse a name that ``get_engine`` does not know, without building anything.

    Raises:
        EngineUnavailable: naming the engines there are.
    """
    if name not in _FACTORIES:
        raise EngineUnavailable(
            _("engine must be one of %(allowed)s, not %(given)s")
            % {"allowed": ", ".join(_FACTORIES), "given": ascii(str(name)[:80])}
        )


def get_engine(name: str) -> LocalTrainingEngine:
    """The engine called ``name``, one per process.

    Raises:
        EngineUnavailable: naming the engines there are.
    """
    check_engine(name)
    with _lock:
        if name not in _engines:
            _engines[name] = _FACTORIES[name]()
        return _engines[name]


def needs_own_process(name: str) -> bool:
    """Whether training with this engine needs a process that ends with it: TensorFlow hangs in a fork of one that ran it."""
    return name not in _IN_THE_WORKER


def _keras() -> LocalTrainingEngine:
    from federation.keras_engine import KerasEngine

    return KerasEngine()


def _cohort() -> LocalTrainingEngine:
    return CohortEngine(threads=settings.ENGINE_THREADS)


_FACTORIES: dict[str, Callable[[], LocalTrainingEngine]] = {"keras": _keras, "cohort": _cohort}
_IN_THE_WORKER = ("cohort",)
_engines: dict[str, LocalTrainingEngine] = {}
_lock = threading.Lock()
