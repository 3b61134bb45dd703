"""Rows of versions: numbers, publication, activation, and finding one by what a person writes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from django.core.files.storage import storages
from django.db import connection, transaction

from aivo_site.audit.models import AuditEvent
from models_store import store
from models_store.errors import NoMainModel, UnknownVersion, VersionConflict
from models_store.models import MainModelVersion, VersionOrigin, VersionStatus
from models_store.versions import activate, active_version, refresh_active_pointer, reserve_version, resolve_version, set_status
from tests.models_store.factories import make_version

pytestmark = pytest.mark.django_db(transaction=True)


def statuses() -> dict[str, str]:
    return dict(MainModelVersion.objects.values_list("version", "status"))


def test_without_an_active_version_there_is_no_main_model() -> None:
    with pytest.raises(NoMainModel) as caught:
        active_version()
    assert caught.value.code == "no_main_model"


def test_versions_are_numbered_one_after_the_other() -> None:
    rows = [reserve_version(origin=VersionOrigin.TRAINED) for _ in range(3)]
    assert [(row.version, row.sequence, row.status) for row in rows] == [
        ("aivo-main-v1", 1, "TRAINING"), ("aivo-main-v2", 2, "TRAINING"), ("aivo-main-v3", 3, "TRAINING"),
    ]  # fmt: skip


def test_the_same_training_has_one_row() -> None:
    first = reserve_version(origin=VersionOrigin.TRAINED, training_fingerprint="f" * 64)
    assert reserve_version(origin=VersionOrigin.TRAINED, training_fingerprint="f" * 64).pk == first.pk
    assert MainModelVersion.objects.count() == 1


def in_threads(work: list[object]) -> list[BaseException | None]:
    """Run calls at the same moment, each with its own connection; what each raised."""
    errors: list[BaseException | None] = [None] * len(work)
    barrier = threading.Barrier(len(work))

    def run(index: int) -> None:
        barrier.wait()
        try:
            work[index]()  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001
            errors[index] = error
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_processes_that_reserve_at_the_same_moment_get_different_numbers() -> None:
    errors = in_threads([lambda: reserve_version(origin=VersionOrigin.FEDERATED)] * 4)
    assert errors == [None] * 4
    assert sorted(MainModelVersion.objects.values_list("sequence", flat=True)) == [1, 2, 3, 4]


def test_activation_archives_the_one_before_and_is_audited() -> None:
    first = make_version(seed=1)
    second = make_version(seed=2, active=False)
    activate(row=second, actor="olga", reason="better on every head")
    assert statuses() == {first.version: "ARCHIVED", second.version: "ACTIVE"}
    assert second.promoted_at is not None
    event = AuditEvent.objects.get(object_id=str(second.pk))
    assert (event.actor, event.data["previous"], event.data["reason"]) == ("olga", first.version, "better on every head")


def test_of_two_activations_that_expect_the_same_version_one_wins() -> None:
    base = make_version(seed=1)
    rows = [make_version(seed=seed, active=False) for seed in (2, 3)]
    errors = in_threads([lambda row=row: activate(row=row, actor="a", reason="r", expected_active=base) for row in rows])
    assert sorted(type(error) for error in errors if error is not None) == [VersionConflict]
    assert sorted(statuses().values()) == ["ACTIVE", "ARCHIVED", "CANDIDATE"]
    refresh_active_pointer()
    assert (store.read_active_pointer() or {})["version"] == active_version().version


def test_a_version_that_is_active_unfinished_or_deprecated_cannot_become_active() -> None:
    active = make_version(seed=1)
    unfinished = reserve_version(origin=VersionOrigin.TRAINED)
    deprecated = make_version(seed=2, active=False)
    set_status(row=deprecated, status=VersionStatus.DEPRECATED, allowed=(VersionStatus.CANDIDATE,))
    before = statuses()
    for row in (active, unfinished, deprecated):
        with pytest.raises(VersionConflict) as caught:
            activate(row=row, actor="a", reason="r")
        assert caught.value.code == "version_conflict"
    assert statuses() == before
    assert AuditEvent.objects.count() == 1


def test_an_archived_version_can_become_active_again() -> None:
    first, second = make_version(seed=1), make_version(seed=2)
    activate(row=first, actor="a", reason="rollback", expected_active=second)
    assert statuses() == {first.version: "ACTIVE", second.version: "ARCHIVED"}


def test_the_pointer_follows_the_commit_and_nothing_else() -> None:
    first = make_version(seed=1)
    assert (store.read_active_pointer() or {})["version"] == first.version
    second = make_version(seed=2, active=False)
    with pytest.raises(RuntimeError), transaction.atomic():
        activate(row=second, actor="a", reason="r")
        raise RuntimeError
    assert (store.read_active_pointer() or {})["version"] == first.version
    assert statuses()[first.version] == "ACTIVE"
    with transaction.atomic():
        activate(row=second, actor="a", reason="r")
        assert (store.read_active_pointer() or {})["version"] == first.version
    pointer = store.read_active_pointer() or {}
    assert (pointer["version"], pointer["path"], pointer["manifest_sha256"]) == (
        second.version,
        second.model_path,
        second.manifest_sha256,
    )


def test_a_version_is_found_by_name_by_path_and_by_the_path_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    row = make_version()
    root = Path(storages[store.MAIN_MODELS].location)  # type: ignore[attr-defined]
    monkeypatch.chdir(root.parent)
    names = [
        row.version, row.model_path, f"{row.model_path}/weights.safetensors", str(root / row.model_path),
        str(root / row.model_path / "manifest.json"), str(root), root.name, f"./{root.name}/{row.model_path}",
    ]  # fmt: skip
    assert {resolve_version(name).pk for name in names} == {row.pk}


@pytest.mark.parametrize("text", ["aivo-main-v99", "/etc/passwd", "../../etc", "", "a\0b", "nothing/here"])
def test_what_names_no_version_is_refused_with_those_there_are(text: str) -> None:
    row = make_version()
    with pytest.raises(UnknownVersion, match=row.version):
        resolve_version(text)
