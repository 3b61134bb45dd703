"""The one reader of environment variables: typed, with defaults, and with typing errors fatal.

Values come from the process environment, then from the file ``.env`` beside ``manage.py``. A name in ``.env``, or one
in the environment that begins with ``AIVO_``, that is not listed here is a typing error and stops the start.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import environ
from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent.parent

NAMES = frozenset(
    {
        "USE_FEDERATED_LEARNING",
        "AIVO_MAIN_MODEL_PATH",
        "AIVO_LEARNER_MODELS_PATH",
        "AIVO_ENGINE_THREADS",
        "AIVO_ENGINE_MEMORY_MB",
        "AIVO_PROCESS_ROLE",
        "AIVO_STATIC_ROOT",
        "AIVO_TIME_ZONE",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "PINECONE_API_KEY",
        "PINECONE_INDEX",
        "PINECONE_HOST",
        "DATABASE_URL",
        "SECRET_KEY",
        "ALLOWED_HOSTS",
        "DEBUG",
        "HTTPS",
        "REQUIRE_TWO_FACTOR",
        "Q_BROKER",
    }
)
"""Every variable the product reads; ``AIVO_SHARED`` is the tests' own."""

_TESTS_ONLY = frozenset({"AIVO_SHARED"})
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})


@dataclass(frozen=True)
class Environment:
    """What the environment says, each value with its type."""

    use_federated_learning: bool
    main_model_path: Path
    learner_models_path: Path
    engine_threads: int | None
    engine_memory_mb: int | None
    process_role: str
    static_root: Path
    time_zone: str
    openai_api_key: str
    openai_base_url: str
    pinecone_api_key: str
    pinecone_index: str
    pinecone_host: str
    database_url: str
    secret_key: str
    allowed_hosts: tuple[str, ...]
    debug: bool
    https: bool
    require_two_factor: bool
    q_broker: str


def read_environment() -> Environment:
    """Read and check all variables.

    Raises:
        ImproperlyConfigured: an unknown name, or a value outside what is allowed; the message names both.
    """
    dotenv = BASE_DIR / ".env"
    if dotenv.is_file():
        _refuse_unknown_names(dotenv)
        environ.Env.read_env(str(dotenv))
    unknown = sorted(name for name in os.environ if name.startswith("AIVO_") and name not in NAMES | _TESTS_ONLY)
    if unknown:
        raise ImproperlyConfigured(f"unknown environment variable {', '.join(unknown)}; known: {', '.join(sorted(NAMES))}")
    return Environment(
        use_federated_learning=_boolean("USE_FEDERATED_LEARNING", default=False),
        main_model_path=_path("AIVO_MAIN_MODEL_PATH", "models/main-aivo"),
        learner_models_path=_path("AIVO_LEARNER_MODELS_PATH", "models/learners"),
        engine_threads=_positive("AIVO_ENGINE_THREADS", most=1024),
        engine_memory_mb=_positive("AIVO_ENGINE_MEMORY_MB", most=1_000_000),
        process_role=_word("AIVO_PROCESS_ROLE", default="command", allowed=("command", "web", "worker")),
        static_root=_path("AIVO_STATIC_ROOT", "staticfiles"),
        time_zone=os.environ.get("AIVO_TIME_ZONE", "UTC"),
        openai_api_key=os.environ.get("OPENAI_API_KEY", ""),
        openai_base_url=os.environ.get("OPENAI_BASE_URL", ""),
        pinecone_api_key=os.environ.get("PINECONE_API_KEY", ""),
        pinecone_index=os.environ.get("PINECONE_INDEX", ""),
        pinecone_host=os.environ.get("PINECONE_HOST", ""),
        database_url=os.environ.get("DATABASE_URL") or f"sqlite:///{BASE_DIR / 'db.sqlite3'}",
        secret_key=os.environ.get("SECRET_KEY", ""),
        allowed_hosts=tuple(host.strip() for host in os.environ.get("ALLOWED_HOSTS", "").split(",") if host.strip()),
        debug=_boolean("DEBUG", default=False),
        https=_boolean("HTTPS", default=True),
        require_two_factor=_boolean("REQUIRE_TWO_FACTOR", default=False),
        q_broker=_word("Q_BROKER", default="orm", allowed=("orm", "redis")),
    )


def _refuse_unknown_names(dotenv: Path) -> None:
    for number, line in enumerate(dotenv.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name = text.removeprefix("export ").split("=", 1)[0].strip()
        if name not in NAMES:
            raise ImproperlyConfigured(f".env line {number}: unknown name {name}; known: {', '.join(sorted(NAMES))}")


def _boolean(name: str, *, default: bool) -> bool:
    raw = os.environ.get(name)
    if raw is None:
        return default
    value = raw.strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ImproperlyConfigured(f"{name} must be true or false, not {raw!r}")


def _word(name: str, *, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default).strip().lower()
    if value not in allowed:
        raise ImproperlyConfigured(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    return value


def _positive(name: str, *, most: int) -> int | None:
    """None where it is not set."""
    raw = os.environ.get(name, "").strip()
    if not raw:
        return None
    if not (raw.isascii() and raw.isdigit() and 1 <= int(raw[:9]) <= most and len(raw) < 10):
        raise ImproperlyConfigured(f"{name} must be a whole number from 1 to {most}, not {raw!r}")
    return int(raw)


def _path(name: str, default: str) -> Path:
    raw = Path(os.environ.get(name) or default)
    return raw if raw.is_absolute() else BASE_DIR / raw
