"""Writes ``.env`` for a first start on one machine: a generated key, loopback only, no https.

An existing file is left as it is.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

DOTENV = Path(__file__).resolve().parent.parent / ".env"

TEMPLATE = """\
# Written by the first start. .env.example explains every name.
USE_FEDERATED_LEARNING=true
SECRET_KEY={key}
ALLOWED_HOSTS=127.0.0.1,localhost
HTTPS=false
"""


def write_dotenv(path: Path = DOTENV) -> bool:
    """Create the file, readable by its owner only, unless it exists; returns whether it was written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(TEMPLATE.format(key=secrets.token_urlsafe(48)))
    return True


if __name__ == "__main__":
    sys.stderr.write(".env written\n" if write_dotenv() else ".env is already there\n")
