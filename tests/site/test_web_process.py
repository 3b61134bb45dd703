"""The web process never loads TensorFlow, whatever it imports or serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

LOAD_EVERYTHING = """
import sys
import django
django.setup()
from django.contrib import admin
from django.urls import get_resolver
admin.autodiscover()
list(get_resolver().url_patterns)
import aivo_site.wsgi
loaded = sorted(name for name in sys.modules if name.split(".")[0] in {"tensorflow", "keras"})
print(loaded[:5])
sys.exit(1 if loaded else 0)
"""

SERVE_EVERY_LIST = """
import sys
import django
django.setup()
from django.conf import settings
from django.contrib import admin
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.test import Client
from django.urls import reverse
call_command("migrate", verbosity=0)
user = get_user_model().objects.create_superuser("probe", "", "long-enough-password")
client = Client()
client.force_login(user)
assert client.get(reverse("admin:index")).status_code == 200
for model in admin.site._registry:
    label = f"{model._meta.app_label}_{model._meta.model_name}"
    answer = client.get(reverse(f"admin:{label}_changelist"))
    assert answer.status_code == 200, (label, answer.status_code)
loaded = sorted(name for name in sys.modules if name.split(".")[0] in {"tensorflow", "keras"})
print(loaded[:5])
sys.exit(1 if loaded else 0)
"""


def _run(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", "DATABASE_URL": f"sqlite:///{tmp_path / 'probe.sqlite3'}"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, cwd=REPOSITORY)


def test_importing_apps_admin_and_routes_loads_no_tensorflow(tmp_path: Path) -> None:
    done = _run(LOAD_EVERYTHING, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_serving_every_list_of_the_console_loads_no_tensorflow(tmp_path: Path) -> None:
    done = _run(SERVE_EVERY_LIST, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
