"""Writing and checking the audit log.

Each event's hash is the SHA-256 of its content and of the hash before, so that an event that was altered, removed,
inserted or moved breaks the chain at that place. Cutting off the end leaves a whole chain: who must notice that keeps the
last sequence and hash elsewhere (``verify`` returns both).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from django.core.serializers.json import DjangoJSONEncoder
from django.db import connections, router, transaction
from django.utils import timezone

from aivo_site.audit.models import AuditEvent

if TYPE_CHECKING:
    from django.contrib.auth.models import AbstractBaseUser

GENESIS_HASH = "0" * 64
"""What the first event names as the hash before it."""

_ADVISORY_LOCK = 0x4149564F_41554454
"""PostgreSQL advisory lock that orders the writers (the letters AIVOAUDT)."""

_PROBLEMS_SHOWN = 100


@dataclass(frozen=True)
class Problem:
    """One place where the chain is broken."""

    sequence: int
    code: str
    message: str


@dataclass(frozen=True)
class VerificationReport:
    """What a check of the whole log found; ``problems`` holds the first hundred, ``problem_count`` counts all."""

    events: int
    last_sequence: int
    last_hash: str
    problem_count: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def verified(self) -> bool:
        return self.problem_count == 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verified": self.verified}


def record(
    *,
    action: str,
    actor: AbstractBaseUser | str,
    object_type: str = "",
    object_id: str = "",
    data: Mapping[str, Any] | None = None,
) -> AuditEvent:
    """Append one event, as part of the caller's transaction if there is one.

    Writers are ordered by a lock that lasts until that transaction ends, so record as late in it as possible.

    Args:
        action: a stable word such as ``main_model.promoted``.
        actor: a user, or the name of the command or schedule that acted.
        data: ids, numbers and words; learners by subject key.

    Raises:
        ValueError: ``action`` or ``actor`` is empty, a text is too long, or a number in ``data`` is not finite.
        TypeError: something in ``data`` has no JSON form.
    """
    name = actor if isinstance(actor, str) else actor.get_username()
    values = {"actor": name, "action": action, "object_type": object_type, "object_id": str(object_id)}
    _check_texts(values)
    plain = json.loads(json.dumps(dict(data or {}), cls=DjangoJSONEncoder, allow_nan=False))
    with transaction.atomic(using=_database()):
        last = _lock_last()
        event = AuditEvent(
            sequence=last.sequence + 1 if last else 1,
            at=timezone.now(),
            data=plain,
            previous_hash=last.hash if last else GENESIS_HASH,
            **values,
        )
        event.hash = event_hash(event)
        event.save(force_insert=True)
    return event


def event_hash(event: AuditEvent) -> str:
    """SHA-256, in hexadecimal, of the event's content as canonical JSON (sorted keys, no spaces, UTF-8, time in UTC)."""
    content = {
        "sequence": event.sequence,
        "at": _utc_text(event.at),
        "actor": event.actor,
        "action": event.action,
        "object_type": event.object_type,
        "object_id": event.object_id,
        "data": event.data,
        "previous_hash": event.previous_hash,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def verify() -> VerificationReport:
    """Walk the whole log and report every place where content, order or completeness is broken."""
    problems: list[Problem] = []
    count = events = 0
    sequence, last_hash = 0, GENESIS_HASH
    for event in AuditEvent.objects.order_by("sequence").iterator(chunk_size=2000):
        found = _problems(event, after=sequence, last_hash=last_hash)
        count += len(found)
        problems += found[: max(0, _PROBLEMS_SHOWN - len(problems))]
        events += 1
        sequence, last_hash = event.sequence, event.hash
    return VerificationReport(events, sequence, last_hash, count, problems)


def _problems(event: AuditEvent, *, after: int, last_hash: str) -> list[Problem]:
    found = []
    if event.sequence != after + 1:
        gap = f"events {after + 1} to {event.sequence - 1} are missing"
        found.append(Problem(event.sequence, "missing", gap))
    if event.previous_hash != last_hash:
        text = "the hash before it is not the one it names: an event before it was altered, removed, inserted or moved"
        found.append(Problem(event.sequence, "broken_chain", text))
    if event_hash(event) != event.hash:
        found.append(Problem(event.sequence, "altered", "its content does not give its hash"))
    return found


def _lock_last() -> AuditEvent | None:
    """The last event, with every other writer waiting until this transaction ends."""
    connection = connections[_database()]
    if connection.vendor == "postgresql":
        # Locking the last row would let two writers read the same last row when the table is empty.
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_ADVISORY_LOCK])
    # SQLite transactions are IMMEDIATE: the only writer is this one.
    last: AuditEvent | None = AuditEvent.objects.using(_database()).order_by("-sequence").first()
    return last


def _database() -> str:
    return router.db_for_write(AuditEvent)


def _check_texts(values: Mapping[str, str]) -> None:
    for name, value in values.items():
        longest = int(vars(AuditEvent._meta.get_field(name))["max_length"])
        if len(value) > longest:
            raise ValueError(f"{name} must have at most {longest} characters, not {len(value)}")
    for name in ("action", "actor"):
        if not values[name]:
            raise ValueError(f"{name} must not be empty")


def _utc_text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
