"""Verification finds every damage and every stray file; garbage collection removes only what no row needs."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from pathlib import Path

import pytest
from django.core.files.storage import storages
from django.core.management import call_command

from models_store import references, store
from models_store.garbage import collect_garbage
from models_store.models import MainModelVersion, PersonalizedModel, PersonalizedModelStatus, VersionOrigin
from models_store.references import FileReference, ReferenceSource, checkpoint_path
from models_store.verification import verify_store
from models_store.versions import reserve_version
from tests.models_store.factories import SMALL, make_learner, make_version, random_tail

pytestmark = pytest.mark.django_db(transaction=True)


def root(alias: str) -> Path:
    return Path(storages[alias].location)  # type: ignore[attr-defined]


def make_old(alias: str, path: str) -> None:
    before = time.time() - 2 * 86_400
    os.utime(root(alias) / path, (before, before))


@pytest.fixture
def model() -> PersonalizedModel:
    version = make_version()
    learner = make_learner("ada")
    stored = store.write_tail(learner_id="ada", number=1, spec=SMALL, tail=random_tail(SMALL, 1))
    return PersonalizedModel.objects.create(
        learner=learner,
        source_version=version,
        status=PersonalizedModelStatus.ACTIVE,
        weights_path=stored.path,
        weights_sha256=stored.sha256,
    )


def test_a_sound_store_is_reported_as_sound(model: PersonalizedModel) -> None:
    report = verify_store()
    assert report.is_sound
    assert report.to_json() | {"orphaned": 0, "active_pointer": "ok", "files": 6} == report.to_json()


def test_an_empty_store_is_sound() -> None:
    assert verify_store().to_json()["active_pointer"] is None
    assert verify_store().is_sound


def test_each_kind_of_damage_is_named(model: PersonalizedModel) -> None:
    tail = root(store.LEARNER_MODELS) / model.weights_path
    tail.write_bytes(tail.read_bytes()[:-1])
    version = MainModelVersion.objects.get()
    (root(store.MAIN_MODELS) / version.model_path / "MODEL_CARD.md").unlink()
    (root(store.MAIN_MODELS) / "ACTIVE.json").write_text('{"version": "aivo-main-v7"}')
    (root(store.MAIN_MODELS) / "stray.txt").write_text("?")
    report = verify_store()
    assert report.corrupt == [f"learner_models:{model.weights_path}"]
    assert report.missing == [f"main_models:{version.model_path}/MODEL_CARD.md"]
    assert report.orphaned == ["main_models:stray.txt"]
    assert report.active_pointer == "stale"
    assert len(report.problems) == 3
    assert not report.is_sound


def test_a_replaced_tail_waits_for_a_day_and_is_then_an_orphan(model: PersonalizedModel) -> None:
    path = store.write_tail(learner_id="ada", number=2, spec=SMALL, tail=random_tail(SMALL, 2)).path
    report = verify_store()
    assert (report.orphaned, report.waiting) == ([], 1)
    make_old(store.LEARNER_MODELS, path)
    report = verify_store()
    assert (report.orphaned, report.waiting) == ([f"learner_models:{path}"], 0)


def test_files_of_a_version_whose_manifest_is_gone_are_no_garbage(model: PersonalizedModel) -> None:
    version = MainModelVersion.objects.get()
    folder = root(store.MAIN_MODELS) / version.model_path
    (folder / "manifest.json").unlink()
    for path in folder.iterdir():
        make_old(store.MAIN_MODELS, f"{version.model_path}/{path.name}")
    assert collect_garbage().removed == []
    assert verify_store().missing == [f"main_models:{version.model_path}/manifest.json"]


def test_a_missing_pointer_is_reported_and_repaired(model: PersonalizedModel) -> None:
    (root(store.MAIN_MODELS) / "ACTIVE.json").unlink()
    assert verify_store().active_pointer == "missing"
    assert collect_garbage().pointer_repaired
    assert verify_store().active_pointer == "ok"


def test_the_command_tells_damage_by_its_exit_code(model: PersonalizedModel) -> None:
    out = StringIO()
    call_command("verify_store", "--json", stdout=out)
    assert {"files", "missing", "corrupt", "orphaned", "active_pointer"} <= set(json.loads(out.getvalue()))
    (root(store.LEARNER_MODELS) / model.weights_path).unlink()
    out = StringIO()
    with pytest.raises(SystemExit) as caught:
        call_command("verify_store", "--json", stdout=out)
    assert caught.value.code == 1
    assert json.loads(out.getvalue())["missing"] == 1


def test_only_old_files_without_a_row_are_removed(model: PersonalizedModel) -> None:
    old = store.write_tail(learner_id="ada", number=2, spec=SMALL, tail=random_tail(SMALL, 2)).path
    young = store.write_tail(learner_id="ada", number=3, spec=SMALL, tail=random_tail(SMALL, 3)).path
    make_old(store.LEARNER_MODELS, old)
    make_old(store.LEARNER_MODELS, model.weights_path)
    assert collect_garbage(dry_run=True).removed == [f"learner_models:{old}"]
    report = collect_garbage()
    assert (report.removed, report.kept_recent) == ([f"learner_models:{old}"], 1)
    names = {found.path for found in store.list_files(alias=store.LEARNER_MODELS)}
    assert names == {young, model.weights_path}
    assert collect_garbage().removed == []


def test_writing_an_old_orphan_again_makes_it_young() -> None:
    tail = random_tail(SMALL, 2)
    path = store.write_tail(learner_id="ada", number=1, spec=SMALL, tail=tail).path
    make_old(store.LEARNER_MODELS, path)
    store.write_tail(learner_id="ada", number=1, spec=SMALL, tail=tail)
    assert collect_garbage().removed == []


def test_abandoned_temporary_files_go_and_files_of_others_stay(model: PersonalizedModel) -> None:
    for name in (".tmp-0123456789abcdef", "holiday.jpg", "id-ada/notes.txt"):
        (root(store.LEARNER_MODELS) / name).write_bytes(b"x")
        make_old(store.LEARNER_MODELS, name)
    report = collect_garbage()
    assert report.removed == ["learner_models:.tmp-0123456789abcdef"]
    assert report.unknown == ["learner_models:holiday.jpg", "learner_models:id-ada/notes.txt"]


def test_the_checkpoint_of_an_open_training_stays_and_a_finished_ones_goes() -> None:
    fingerprints = ["a" * 64, "b" * 64]
    for fingerprint in fingerprints:
        store.replace_file(alias=store.MAIN_MODELS, path=checkpoint_path(fingerprint), data=b"state")
        make_old(store.MAIN_MODELS, checkpoint_path(fingerprint))
    reserve_version(origin=VersionOrigin.TRAINED, training_fingerprint=fingerprints[0])
    assert verify_store().orphaned == [f"main_models:{checkpoint_path(fingerprints[1])}"]
    assert collect_garbage().removed == [f"main_models:{checkpoint_path(fingerprints[1])}"]


@pytest.fixture
def deltas() -> Iterator[list[FileReference]]:
    """Another app's kind of files."""
    held: list[FileReference] = []
    pattern = re.compile(r"id-[a-z]+/deltas/.+")
    before = dict(references._sources)
    references.register_source(ReferenceSource("test deltas", store.LEARNER_MODELS, pattern, lambda: held))
    yield held
    references._sources.clear()
    references._sources.update(before)


def test_files_of_another_app_are_kept_while_its_rows_point_to_them(deltas: list[FileReference]) -> None:
    stored = store.write_delta(learner_id="ada", session_id="s", spec=SMALL, delta=random_tail(SMALL, 1))
    make_old(store.LEARNER_MODELS, stored.path)
    deltas.append(FileReference(store.LEARNER_MODELS, stored.path, stored.sha256))
    assert collect_garbage().removed == []
    assert verify_store().files == 1
    deltas.clear()
    assert collect_garbage().removed == [f"learner_models:{stored.path}"]


def test_a_negative_age_is_refused() -> None:
    with pytest.raises(store.StoreError, match="older_than"):
        collect_garbage(older_than=timedelta(seconds=-1))
