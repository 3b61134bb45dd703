"""The web process. It may hold a connection pool, and never loads TensorFlow."""

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "aivo_site.settings")
os.environ.setdefault("AIVO_PROCESS_ROLE", "web")

from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()
