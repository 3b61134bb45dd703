"""The reference values of the privacy figures, as releases."""

from __future__ import annotations

import csv
import json
from typing import Any

from federation.privacy.release import Release
from tests.shared import SHARED


def rows(name: str) -> dict[str, dict[str, str]]:
    """The rows of a reference table by their id."""
    with (SHARED / "vectors" / name).open(newline="") as lines:
        return {row["id"]: row for row in csv.DictReader(lines)}


def ledger() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SHARED / "vectors" / "privacy_ledger.json").read_text())
    return loaded


def release(entry: dict[str, Any], **changes: Any) -> Release:
    """A release of a ledger or a table: q_num, q_den, z and T, which is 1 where it is absent."""
    q_num, q_den = int(entry["q_num"]), int(entry["q_den"])
    fields: dict[str, Any] = {
        "z": float(entry["z"]),
        "q_num": q_num,
        "q_den": q_den,
        "steps": int(entry.get("T", 1)),
        "sampling": "none" if q_num == q_den else "poisson",
    }
    return Release(**{**fields, **changes})
