"""The engines of local training by name."""

from __future__ import annotations

import threading
from collections.abc import Callable

from django.conf import settings
from django.utils.translation import gettext as _

from aivo_core.engine.cohort import CohortEngine
from aivo_core.engine.contract import EngineError, LocalTrainingConfig, LocalTrainingEngine
from aivo_core.network import NetworkSpec
from aivo_site.errors import UsageError

MEGABYTE = 2**20


class EngineUnavailable(UsageError):
    """No engine of that name here, and the message names those there are; or (``memory_limit``) too little memory for it."""

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


def check_memory(name: str, *, spec: NetworkSpec, config: LocalTrainingConfig) -> None:
    """Refuse, before anything starts, an engine that may not use the memory that one learner takes.

    Raises:
        EngineUnavailable: ``memory_limit``, naming the setting and what is needed; or no engine of that name.
    """
    check_engine(name)
    if name != CohortEngine.name:
        return  # asking Keras would load TensorFlow here
    engine = get_engine(name)
    if not isinstance(engine, CohortEngine):
        return
    try:
        engine.check_memory(spec, config)
    except EngineError as error:
        text = _("AIVO_ENGINE_MEMORY_MB is too small: %(error)s")
        raise EngineUnavailable(text % {"error": error}, code=error.code) from error


def needs_own_process(name: str) -> bool:
    """Whether training with this engine needs a process that ends with it: TensorFlow hangs in a fork of one that ran it."""
    return name not in _IN_THE_WORKER


def _keras() -> LocalTrainingEngine:
    from federation.keras_engine import KerasEngine

    return KerasEngine()


def _cohort() -> LocalTrainingEngine:
    megabytes = settings.ENGINE_MEMORY_MB
    return CohortEngine(threads=settings.ENGINE_THREADS, memory_limit=None if megabytes is None else megabytes * MEGABYTE)


_FACTORIES: dict[str, Callable[[], LocalTrainingEngine]] = {"keras": _keras, "cohort": _cohort}
_IN_THE_WORKER = ("cohort",)
_engines: dict[str, LocalTrainingEngine] = {}
_lock = threading.Lock()
