"""The audit log: its chain, and what a check of it finds."""

from __future__ import annotations

import io
import json
import threading
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection, connections, transaction
from django.utils import timezone

from aivo_site.audit.models import AuditEvent
from aivo_site.audit.services import GENESIS_HASH, event_hash, record, verify
from aivo_site.database import AppendOnlyError

pytestmark = pytest.mark.django_db


def write(count: int) -> list[AuditEvent]:
    return [record(action="thing.done", actor="a test", object_id=str(number), data={"n": number}) for number in range(count)]


def change(sequence: int, /, **columns: Any) -> None:
    """What somebody with write access to the database can do, past the product."""
    names = ", ".join(f"{name} = %s" for name in columns)
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE audit_auditevent SET {names} WHERE sequence = %s", [*columns.values(), sequence])


def remove(sequence: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM audit_auditevent WHERE sequence = %s", [sequence])


def found() -> list[tuple[int, str]]:
    return [(problem.sequence, problem.code) for problem in verify().problems]


def test_each_event_carries_the_hash_of_the_one_before() -> None:
    first, second = write(2)
    assert (first.sequence, first.previous_hash) == (1, GENESIS_HASH)
    assert (second.sequence, second.previous_hash) == (2, first.hash)
    report = verify()
    assert (report.verified, report.events, report.last_sequence, report.last_hash) == (True, 2, 2, second.hash)


def test_an_empty_log_is_whole() -> None:
    assert verify().verified and verify().last_hash == GENESIS_HASH


def test_the_hash_is_the_same_after_the_database_kept_the_event() -> None:
    data = {"ü": ["x", 1, 2.5, None, True], "a": {"b": 10**12}, "small": 1e-7}
    event = record(action="thing.done", actor=User(username="anna"), object_type="round", object_id="7", data=data)
    kept = AuditEvent.objects.get(id=event.id)
    assert kept.actor == "anna"
    assert event_hash(kept) == kept.hash == event.hash


@pytest.mark.parametrize(
    ("columns"),
    [
        {"action": "other"},
        {"actor": "someone else"},
        {"object_id": "99"},
        {"object_type": "learner"},
        {"data": '{"n": 2}'},
        {"at": timezone.now().isoformat()},
    ],
)
def test_an_altered_event_is_found(columns: dict[str, Any]) -> None:
    write(4)
    change(2, **columns)
    assert found() == [(2, "altered")]


def test_an_alteration_with_a_matching_hash_breaks_the_next_event() -> None:
    events = write(4)
    forged = AuditEvent.objects.get(sequence=2)
    forged.actor = "someone else"
    change(2, actor=forged.actor, hash=event_hash(forged))
    assert found() == [(3, "broken_chain")]
    assert events[1].hash != event_hash(forged)


def test_a_removed_event_is_found() -> None:
    write(4)
    remove(2)
    assert found() == [(3, "missing"), (3, "broken_chain")]


def test_a_removed_first_event_is_found() -> None:
    write(3)
    remove(1)
    assert found() == [(2, "missing"), (2, "broken_chain")]


def test_a_removed_last_event_shows_in_the_last_hash() -> None:
    write(3)
    before = verify().last_hash
    remove(3)
    report = verify()
    assert report.verified and report.last_sequence == 2 and report.last_hash != before


def test_an_inserted_event_is_found() -> None:
    first, *_rest = write(3)
    change(3, sequence=4)
    change(2, sequence=3)
    forged = AuditEvent(sequence=2, at=timezone.now(), actor="x", action="forged", previous_hash=first.hash)
    forged.hash = event_hash(forged)
    forged.save(force_insert=True)
    problems = found()
    assert (3, "broken_chain") in problems and (3, "altered") in problems


def test_reordered_events_are_found() -> None:
    write(4)
    change(2, sequence=100)
    change(3, sequence=2)
    change(100, sequence=3)
    assert {sequence for sequence, _code in found()} == {2, 3, 4}


def test_an_event_of_a_transaction_that_fails_leaves_no_trace() -> None:
    write(1)
    with pytest.raises(RuntimeError), transaction.atomic():
        record(action="thing.done", actor="a test")
        raise RuntimeError
    (event,) = write(1)
    assert event.sequence == 2 and verify().verified


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "", "actor": "x"}, "action must not be empty"),
        ({"action": "a", "actor": ""}, "actor must not be empty"),
        ({"action": "a" * 65, "actor": "x"}, "action must have at most 64"),
        ({"action": "a", "actor": "x", "object_id": "1" * 65}, "object_id must have at most 64"),
        ({"action": "a", "actor": "x", "data": {"x": float("nan")}}, "JSON"),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(**arguments)
    assert AuditEvent.objects.count() == 0


def test_the_product_can_neither_change_nor_delete_an_event() -> None:
    (event,) = write(1)
    for attempt in (event.save, event.delete, AuditEvent.objects.all().delete, lambda: AuditEvent.objects.update(actor="x")):
        with pytest.raises(AppendOnlyError):
            attempt()


@pytest.mark.django_db(transaction=True)
def test_writers_at_the_same_moment_form_one_chain() -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                with transaction.atomic():
                    record(action="thing.done", actor=f"writer {number}", data={"turn": turn})
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            failures.append(error)
        finally:
            connections.close_all()

    writers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert failures == []
    report = verify()
    assert (report.verified, report.events, report.last_sequence) == (True, 20, 20)


def test_the_command_says_what_it_found_and_fails_on_a_broken_log() -> None:
    write(3)
    out = io.StringIO()
    call_command("verify_audit_log", "--json", stdout=out)
    told = json.loads(out.getvalue())
    assert told["verified"] is True and told["events"] == 3 and told["problem_count"] == 0
    change(2, actor="someone else")
    out = io.StringIO()
    with pytest.raises(SystemExit) as end:
        call_command("verify_audit_log", "--json", stdout=out)
    assert end.value.code == 1
    assert json.loads(out.getvalue())["problems"] == [
        {"sequence": 2, "code": "altered", "message": "its content does not give its hash"}
    ]
