"""Django settings: everything that differs between installations comes from ``aivo_site.environment``."""

from __future__ import annotations

import sys
from typing import Any

import environ
from csp.constants import NONE, SELF, UNSAFE_EVAL, UNSAFE_INLINE
from django.core.exceptions import ImproperlyConfigured
from django.templatetags.static import static
from django.urls import reverse_lazy
from django.utils.translation import gettext_lazy as _

from aivo_site.environment import BASE_DIR, read_environment

ENV = read_environment()

DEBUG = ENV.debug
SECRET_KEY = ENV.secret_key
if not SECRET_KEY:
    raise ImproperlyConfigured("SECRET_KEY is not set: `make run` writes one into .env, production sets its own")
ALLOWED_HOSTS = list(ENV.allowed_hosts)

INSTALLED_APPS = [
    "unfold",
    "unfold.contrib.filters",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "csp",
    "django_q",
    "aivo_site.jobs",
    "aivo_site.audit",
    "learners",
    "models_store",
    "federation",
    "aivo_site.console",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "aivo_site.urls"
WSGI_APPLICATION = "aivo_site.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

# --- Database ---------------------------------------------------------------------------------------------------------


def _database() -> dict[str, Any]:
    config: dict[str, Any] = environ.Env.db_url_config(ENV.database_url)
    engine = config["ENGINE"]
    if engine == "django.db.backends.sqlite3":
        # IMMEDIATE: a transaction that reads and then writes would otherwise fail at once when another writer is busy.
        config["OPTIONS"] = {
            "timeout": 20,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA busy_timeout=20000;",
        }
    elif engine == "django.db.backends.postgresql":
        # A pool is inherited over fork and then shared between processes: web processes only.
        if ENV.process_role == "web":
            config["OPTIONS"] = {"pool": {"min_size": 1, "max_size": 8}}
        config["CONN_MAX_AGE"] = 0
    else:
        raise ImproperlyConfigured(f"DATABASE_URL must name sqlite or postgres, not {engine}")
    config["ATOMIC_REQUESTS"] = False
    return config


DATABASES = {"default": _database()}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}

# --- Files ------------------------------------------------------------------------------------------------------------

STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": {"location": str(BASE_DIR / "media")}},
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedManifestStaticFilesStorage"},
    "main_models": {
        "BACKEND": "django.core.files.storage.FileSystemStorage",
        "OPTIONS": {"location": str(ENV.main_model_path)},
    },
    "learner_models": {
        "BACKEND": "django.core.files.storage.FileSystemStorage",
        "OPTIONS": {"location": str(ENV.learner_models_path)},
    },
}
STATIC_URL = "static/"
STATIC_ROOT = ENV.static_root
DATA_UPLOAD_MAX_MEMORY_SIZE = 5 * 1024 * 1024

# --- Jobs -------------------------------------------------------------------------------------------------------------

# Facts behind these numbers: a message's retry time counts from when it is fetched, so with queue_limit 1 and one worker
# it must exceed three timeouts; deaths of workers do not count as attempts, so the Job row counts starts itself.
_QUEUE_COMMON: dict[str, Any] = {"queue_limit": 1, "bulk": 1, "ack_failures": True, "max_attempts": 1, "save_limit": 20}
Q_CLUSTER: dict[str, Any] = {
    "name": "aivo",
    "orm": "default",
    "workers": 1,
    "timeout": 600,
    "retry": 2000,
    "poll": 0.5,
    "catch_up": False,
    "cached": False,
    "label": "Queue",
    **_QUEUE_COMMON,
    "ALT_CLUSTERS": {"training": {"workers": 1, "timeout": 6 * 3600, "retry": 20 * 3600, "poll": 1, **_QUEUE_COMMON}},
}
if ENV.q_broker == "redis":
    Q_CLUSTER.pop("orm")
    Q_CLUSTER["redis"] = {"host": "127.0.0.1", "port": 6379}

JOB_LEASE_SECONDS = 60
JOB_CANCEL_GRACE_SECONDS = 30
JOB_TERMINATE_GRACE_SECONDS = 10
JOB_RESEND_AFTER_SECONDS = 120

# --- Learning ---------------------------------------------------------------------------------------------------------

USE_FEDERATED_LEARNING = ENV.use_federated_learning
OPENAI_API_KEY = ENV.openai_api_key
ENGINE_THREADS: int | None = ENV.engine_threads
ENGINE_MEMORY_MB: int | None = ENV.engine_memory_mb

# --- Language, time ---------------------------------------------------------------------------------------------------

LANGUAGE_CODE = "en"
LANGUAGES = [("en", _("English"))]
LOCALE_PATHS = [BASE_DIR / "locale"]
USE_I18N = True
USE_TZ = True
TIME_ZONE = ENV.time_zone

# --- Security ---------------------------------------------------------------------------------------------------------

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 12}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
    {"NAME": "django.contrib.auth.password_validation.NumericPasswordValidator"},
]
LOGIN_URL = reverse_lazy("admin:login")
LOGIN_REDIRECT_URL = reverse_lazy("admin:index")
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_AGE = 12 * 3600
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_SECURE = ENV.https
CSRF_COOKIE_SECURE = ENV.https
SECURE_SSL_REDIRECT = ENV.https
SECURE_HSTS_SECONDS = 31_536_000 if ENV.https else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = ENV.https
SECURE_HSTS_PRELOAD = ENV.https
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"

# The theme evaluates expressions in attributes and sets styles inline; the console needs both and nothing more.
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [SELF],
        "script-src": [SELF, UNSAFE_EVAL],
        "style-src": [SELF, UNSAFE_INLINE],
        "img-src": [SELF, "data:"],
        "font-src": [SELF],
        "connect-src": [SELF],
        "object-src": [NONE],
        "base-uri": [SELF],
        "form-action": [SELF],
        "frame-ancestors": [NONE],
    }
}

# --- Console ----------------------------------------------------------------------------------------------------------

UNFOLD: dict[str, Any] = {
    "SITE_TITLE": _("AIVO Federation"),
    "SITE_HEADER": _("AIVO Federation"),
    "SITE_SYMBOL": "hub",
    "SITE_FAVICONS": [{"rel": "icon", "type": "image/svg+xml", "href": lambda _request: static("console/favicon.svg")}],
    "SHOW_HISTORY": True,
    "SHOW_VIEW_ON_SITE": False,
}

# --- Logs -------------------------------------------------------------------------------------------------------------

LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "stream": sys.stderr, "formatter": "plain"}},
    "root": {"handlers": ["stderr"], "level": "INFO"},
    "loggers": {"django_q": {"level": "INFO"}, "django-q": {"level": "WARNING"}},
}
