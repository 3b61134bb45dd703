# make run    the console on http://127.0.0.1:8000 with a worker, filled by the demo
# make demo   the same pipeline without serving
# make test   the test suite on SQLite
# make lint   formatting, lint, types, layers, migrations, deployment checks
# make bench  the benchmarks

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: run demo serve test test-postgres test-browser lint bench clean

$(PY):
	@"$(PYTHON)" -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed, found " + sys.version.split()[0])'
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(PY)
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt | $(PY)
	$(PIP) -r requirements-dev.txt
	@touch $@ $(VENV)/installed

.env: | $(VENV)/installed
	$(PY) -m aivo_site.first_start

ready: $(VENV)/installed .env
	$(PY) manage.py migrate --verbosity 0
	$(PY) manage.py collectstatic --noinput --verbosity 0
	$(PY) manage.py setup_schedules
	$(PY) -m aivo_core.engine.warm_up

.PHONY: ready

demo: ready
	$(PY) manage.py demo

run: demo serve

serve: ready
	@echo "The console is on http://127.0.0.1:8000 (stop with Ctrl-C)"
	$(VENV)/bin/honcho --no-colour start

test: $(VENV)/installed-dev
	$(PY) -m pytest -m "not browser"

test-postgres: $(VENV)/installed-dev
	DATABASE_URL=$${AIVO_TEST_DATABASE_URL:-postgres://postgres@127.0.0.1:5432/postgres} $(PY) -m pytest -m "(django_db or worker) and not browser and not slow" tests/site tests/learners tests/models_store tests/federation
	DATABASE_URL=$${AIVO_TEST_DATABASE_URL:-postgres://postgres@127.0.0.1:5432/postgres} $(PY) -m pytest tests/faults/test_rounds.py

test-browser: $(VENV)/installed-dev
	$(PY) -m pytest -m browser

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	SECRET_KEY=$(LINT_KEY) $(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	SECRET_KEY=$(LINT_KEY) $(PY) manage.py makemigrations --check --dry-run
	SECRET_KEY=$(LINT_KEY) DEBUG=false HTTPS=true ALLOWED_HOSTS=aivo.example $(PY) manage.py check --deploy --fail-level WARNING

# Long and varied enough for check --deploy; never used to serve.
LINT_KEY := lint-only-7Qm2xV9tB4nK8wR1zC6yH3jL5pD0sF-gEaUoIi-XhZvNcMb

bench: $(VENV)/installed-dev
	$(PY) -m benchmarks

clean:
	rm -rf $(VENV) staticfiles
