"""The store: files written whole, verified on reading, and never outside their root."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from django.core.files.storage import InMemoryStorage, storages
from hypothesis import given
from hypothesis import strategies as st

from aivo_core.tensors import write_tensors
from learners.models import LEARNER_ID_PATTERN
from models_store import local_files, store
from models_store.files import checksum, list_files
from models_store.models import MainModelVersion, PersonalizedModel
from models_store.store import LEARNER_MODELS, MAIN_MODELS, StoreError
from models_store.version_files import WEIGHTS
from tests.models_store.factories import SMALL, make_version, random_tail, small_fit
from tests.synthetic_samples import make_weights


def root(alias: str) -> Path:
    return Path(storages[alias].location)  # type: ignore[attr-defined]


def refused(code: str) -> pytest.RaisesExc[StoreError]:
    return pytest.RaisesExc(StoreError, check=lambda error: error.code == code)


@pytest.fixture(autouse=True)
def fresh_cache() -> None:
    store.clear_loaded_versions()


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was_written() -> None:
    stored = store.write_file(alias=MAIN_MODELS, path="a/b.bin", data=b"content")
    assert (stored.path, stored.size, stored.sha256) == ("a/b.bin", 7, checksum(b"content"))
    assert store.read_file(alias=MAIN_MODELS, path=stored.path, sha256=stored.sha256) == b"content"


def test_writing_the_same_again_changes_nothing_and_other_bytes_are_refused() -> None:
    first = store.write_file(alias=MAIN_MODELS, path="a.bin", data=b"one")
    assert store.write_file(alias=MAIN_MODELS, path="a.bin", data=b"one") == first
    with refused("already_exists"):
        store.write_file(alias=MAIN_MODELS, path="a.bin", data=b"two")
    assert store.read_file(alias=MAIN_MODELS, path="a.bin", sha256=first.sha256) == b"one"


def test_no_temporary_file_stays_behind() -> None:
    store.write_file(alias=MAIN_MODELS, path="a.bin", data=b"one")
    store.replace_file(alias=MAIN_MODELS, path="b.bin", data=b"two")
    with refused("already_exists"):
        store.write_file(alias=MAIN_MODELS, path="a.bin", data=b"two")
    assert [found.path for found in list_files(alias=MAIN_MODELS)] == ["a.bin", "b.bin"]


def test_a_write_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write_file(alias=MAIN_MODELS, path="a/b.bin", data=b"x")
    assert list(list_files(alias=MAIN_MODELS)) == []


def test_file_and_folder_are_synchronised_before_a_write_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised: list[str] = []
    real = os.fsync

    def note(handle: int) -> None:
        synchronised.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real(handle)

    monkeypatch.setattr(local_files.os, "fsync", note)
    store.write_file(alias=MAIN_MODELS, path="a/b.bin", data=b"x")
    base = str(root(MAIN_MODELS))
    assert local_files.TEMPORARY_PREFIX in synchronised[0]
    assert {f"{base}/a", base} <= set(synchronised[1:])


def test_a_replaced_file_is_never_seen_half_written() -> None:
    store.replace_file(alias=MAIN_MODELS, path="ACTIVE.json", data=b"old")
    store.replace_file(alias=MAIN_MODELS, path="ACTIVE.json", data=b"new")
    assert store.read_unverified(alias=MAIN_MODELS, path="ACTIVE.json") == b"new"


@pytest.mark.parametrize(
    "path", ["../a", "/etc/passwd", "a/../../b", "", "a//b", "a/.hidden", "a\\b", "a\0b", "ä", "a b", "x" * 301, "a/", "."]
)
def test_a_name_that_could_leave_the_root_is_refused(path: str) -> None:
    with refused("bad_path"):
        store.write_file(alias=MAIN_MODELS, path=path, data=b"x")
    with refused("bad_path"):
        store.read_file(alias=MAIN_MODELS, path=path, sha256=checksum(b"x"))


def test_a_symbolic_link_out_of_the_folder_is_refused_for_reading_and_writing(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.bin").write_bytes(b"secret")
    base = root(MAIN_MODELS)
    base.mkdir(parents=True)
    (base / "link.bin").symlink_to(outside / "secret.bin")
    (base / "folder").symlink_to(outside, target_is_directory=True)
    for path in ("link.bin", "folder/secret.bin"):
        with refused("bad_path"):
            store.read_file(alias=MAIN_MODELS, path=path, sha256=checksum(b"secret"))
    with refused("bad_path"):
        store.write_file(alias=MAIN_MODELS, path="folder/new.bin", data=b"x")
    assert sorted(path.name for path in outside.iterdir()) == ["secret.bin"]


def test_a_link_in_a_circle_and_a_pipe_are_refused() -> None:
    base = root(MAIN_MODELS)
    base.mkdir(parents=True)
    (base / "circle").symlink_to(base / "circle")
    os.mkfifo(base / "pipe")
    with refused("bad_path"):
        store.read_unverified(alias=MAIN_MODELS, path="circle")
    with refused("bad_file"):
        store.read_unverified(alias=MAIN_MODELS, path="pipe")


def test_a_missing_file_and_a_folder_are_said_to_be_so() -> None:
    with refused("missing_file"):
        store.read_unverified(alias=MAIN_MODELS, path="a/b.bin")
    store.write_file(alias=MAIN_MODELS, path="a/b.bin", data=b"x")
    with refused("bad_file"):
        store.read_unverified(alias=MAIN_MODELS, path="a")


def test_a_damaged_file_is_refused_with_both_sums() -> None:
    stored = store.write_file(alias=MAIN_MODELS, path="a.bin", data=b"content")
    (root(MAIN_MODELS) / "a.bin").write_bytes(b"contenu")
    with pytest.raises(StoreError) as caught:
        store.read_file(alias=MAIN_MODELS, path="a.bin", sha256=stored.sha256)
    assert caught.value.code == "checksum_mismatch"
    assert stored.sha256 in str(caught.value)
    assert checksum(b"contenu") in str(caught.value)


def test_another_storage_than_local_files_works_too(settings: object) -> None:
    storages._storages[MAIN_MODELS] = InMemoryStorage()  # type: ignore[attr-defined]
    stored = store.write_file(alias=MAIN_MODELS, path="a/b.bin", data=b"one")
    assert store.write_file(alias=MAIN_MODELS, path="a/b.bin", data=b"one") == stored
    with refused("already_exists"):
        store.write_file(alias=MAIN_MODELS, path="a/b.bin", data=b"two")
    store.replace_file(alias=MAIN_MODELS, path="a/b.bin", data=b"three")
    assert store.read_unverified(alias=MAIN_MODELS, path="a/b.bin") == b"three"
    assert [found.path for found in list_files(alias=MAIN_MODELS)] == ["a/b.bin"]
    assert store.delete_file(alias=MAIN_MODELS, path="a/b.bin")
    with refused("missing_file"):
        store.read_unverified(alias=MAIN_MODELS, path="a/b.bin")


# --- Folders of learners ----------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.from_regex(LEARNER_ID_PATTERN, fullmatch=True),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_different_learners_have_different_folders_even_without_regard_to_case(ids: list[str]) -> None:
    folders = {store.learner_folder(learner_id).casefold() for learner_id in ids}
    assert len(folders) == 2
    assert all(len(folder) <= 255 and "." not in folder for folder in folders)


@pytest.mark.parametrize("learner_id", ["con", "nul.txt", "a..", "0", "A" * 64, "x._-y"])
def test_odd_but_allowed_ids_have_a_safe_folder(learner_id: str) -> None:
    folder = store.learner_folder(learner_id)
    assert store.write_file(alias=LEARNER_MODELS, path=f"{folder}/x.bin", data=b"x").size == 1


@pytest.mark.parametrize("learner_id", ["", "../x", "a/b", "a\0", ".hidden", "x" * 65, "ａ", "a\n"])
def test_what_is_no_learner_id_has_no_folder(learner_id: str) -> None:
    with refused("bad_path"):
        store.learner_folder(learner_id)


# --- Tails ------------------------------------------------------------------------------------------------------------


def stored_tail(data: bytes) -> PersonalizedModel:
    """A row that points to ``data`` with its right checksum: what only the content can be wrong with."""
    stored = store.write_file(alias=LEARNER_MODELS, path=f"id-x/v0001-{checksum(data)[:8]}.safetensors", data=data)
    return PersonalizedModel(weights_path=stored.path, weights_sha256=stored.sha256)


def tail_file(**changes: np.ndarray) -> bytes:
    return write_tensors({**SMALL.unflatten_tail(random_tail(SMALL, 1)), **changes})


def test_a_tail_comes_back_bit_for_bit_and_cannot_be_written_to() -> None:
    tail = random_tail(SMALL, 1)
    stored = store.write_tail(learner_id="Zoe", number=3, spec=SMALL, tail=tail)
    assert stored.path.startswith("id-_zoe/v0003-")
    again = store.read_tail(model=PersonalizedModel(weights_path=stored.path, weights_sha256=stored.sha256), spec=SMALL)
    assert again.tobytes() == tail.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        again[0] = 1.0


def test_a_model_without_weights_has_a_missing_file() -> None:
    with refused("missing_file"):
        store.read_tail(model=PersonalizedModel(), spec=SMALL)


def test_a_tail_cut_short_or_with_one_byte_flipped_is_refused() -> None:
    stored = store.write_tail(learner_id="a", number=1, spec=SMALL, tail=random_tail(SMALL, 1))
    model = PersonalizedModel(weights_path=stored.path, weights_sha256=stored.sha256)
    path = root(LEARNER_MODELS) / stored.path
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]):
        path.write_bytes(damaged)
        with refused("checksum_mismatch"):
            store.read_tail(model=model, spec=SMALL)


def test_content_that_is_wrong_is_refused_although_its_checksum_is_right() -> None:
    name = SMALL.tail_tensors[1].name
    shape = SMALL.tail_tensors[1].shape
    tensors = SMALL.unflatten_tail(random_tail(SMALL, 1))
    renamed = {("other" if key == name else key): value for key, value in tensors.items()}
    cases = {
        "name": write_tensors(renamed),
        "shape": tail_file(**{name: np.zeros(1, np.float32)}),
        "not a number": tail_file(**{name: np.full(shape, np.nan, np.float32)}),
        "infinite": tail_file(**{name: np.full(shape, np.inf, np.float32)}),
        "double": tail_file(**{name: np.zeros(shape, np.float64)}),
        "cut short": tail_file()[:-4],
        "empty": b"",
        "header of 100 MB": (100 * 1024 * 1024).to_bytes(8, "little") + b"{" + b" " * 64,
    }
    for data in cases.values():
        with refused("bad_file"):
            store.read_tail(model=stored_tail(data), spec=SMALL)


def test_a_file_with_a_real_header_of_100_mb_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    path = root(LEARNER_MODELS) / "id-x" / "v0001-00000000.safetensors"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write((100 * 1024 * 1024).to_bytes(8, "little") + b"{")
        file.truncate(101 * 1024 * 1024)
    with refused("bad_file"):
        store.read_tail(
            model=PersonalizedModel(weights_path="id-x/v0001-00000000.safetensors", weights_sha256="0" * 64), spec=SMALL
        )


def test_deltas_and_aggregates_come_back_bit_for_bit() -> None:
    delta = random_tail(SMALL, 2)
    stored = store.write_delta(learner_id="a", session_id="5e55", spec=SMALL, delta=delta)
    assert store.read_delta(path=stored.path, sha256=stored.sha256, spec=SMALL).tobytes() == delta.tobytes()
    aggregate = store.write_aggregate(round_sequence=4, attempt=2, spec=SMALL, aggregate=delta, metadata={"learners": 5})
    assert aggregate.path == "rounds/4/attempt-2.safetensors"
    assert store.read_aggregate(path=aggregate.path, sha256=aggregate.sha256, spec=SMALL).tobytes() == delta.tobytes()
    with refused("already_exists"):
        store.write_aggregate(round_sequence=4, attempt=2, spec=SMALL, aggregate=-delta, metadata={})


# --- Versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_a_version_comes_back_as_it_was_written() -> None:
    row = make_version(seed=3, content_mix=0.15)
    loaded = store.load_version(row)
    expected = make_weights(SMALL, 3)
    assert loaded.spec == SMALL
    assert all(loaded.weights[name].tobytes() == expected[name].tobytes() for name in expected)
    assert loaded.tail.tobytes() == SMALL.flatten_tail(expected).tobytes()
    assert (loaded.version, loaded.content_mix) == (row.version, 0.15)
    assert loaded.encoder.sha256 == row.encoder_sha256 == small_fit().encoder.sha256
    assert store.load_version(row) is loaded
    with pytest.raises(ValueError, match="read-only"):
        loaded.tail[0] = 1.0


@pytest.mark.django_db(transaction=True)
def test_the_manifest_names_tensors_lineage_sums_and_a_place_for_a_signature() -> None:
    row = make_version()
    manifest = json.loads((root(MAIN_MODELS) / row.model_path / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["tensors"]] == [tensor.name for tensor in SMALL.tensors]
    assert manifest["signature"] == {"algorithm": None, "key_id": None, "value": None}
    for name, entry in manifest["files"].items():
        data = (root(MAIN_MODELS) / row.model_path / name).read_bytes()
        assert (checksum(data), len(data)) == (entry["sha256"], entry["bytes"])


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "encoder.json", "encoder.safetensors"])
@pytest.mark.parametrize("damage", ["cut short", "one byte flipped", "missing"])
def test_a_version_with_any_damaged_file_is_refused(name: str, damage: str) -> None:
    row = make_version()
    path = root(MAIN_MODELS) / row.model_path / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(whole) // 2
        path.write_bytes(
            whole[:-3] if damage == "cut short" else whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        )
    with refused("missing_file" if damage == "missing" else "checksum_mismatch"):
        store.load_version(row)


def repointed(row: MainModelVersion, name: str, data: bytes) -> MainModelVersion:
    """The row and manifest made to agree with other content of one file: checksums no longer protect."""
    folder = root(MAIN_MODELS) / row.model_path
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": checksum(data), "bytes": len(data)}
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    row.manifest_sha256 = checksum(text)
    return row


@pytest.mark.django_db(transaction=True)
def test_weights_that_are_wrong_are_refused_although_all_sums_are_right() -> None:
    weights = dict(make_weights(SMALL, 0))
    bias = "difficulty_output/bias"
    gamma = "shared_bn_3/gamma"
    cases = [
        write_tensors({("shared_bn_3/gama" if key == gamma else key): value for key, value in weights.items()}),
        write_tensors({**weights, gamma: np.ones(1, np.float32)}),
        write_tensors({**weights, bias: np.full(10, np.nan, np.float32)}),
        write_tensors({key: value for key, value in weights.items() if key != bias}),
        write_tensors({**weights, "extra": np.zeros(3, np.float32)}),
        (100 * 1024 * 1024).to_bytes(8, "little") + b"{" + b" " * 100,
        write_tensors(weights) + b"\0" * (2 * 1024 * 1024),
    ]
    row = make_version()
    for data in cases:
        with refused("bad_file"):
            store.load_version(repointed(row, WEIGHTS, data))


@pytest.mark.django_db(transaction=True)
def test_an_encoder_that_is_none_is_refused_although_all_sums_are_right() -> None:
    row = make_version()
    with refused("bad_file"):
        store.load_version(repointed(row, "encoder.json", b"{}"))


@pytest.mark.django_db(transaction=True)
def test_a_version_can_be_used_only_with_its_own_encoder() -> None:
    row = make_version()
    row.encoder_sha256 = "0" * 64
    with refused("checksum_mismatch"):
        store.load_version(row)


@pytest.mark.django_db(transaction=True)
def test_weights_behind_a_link_out_of_the_store_are_refused(tmp_path: Path) -> None:
    row = make_version()
    path = root(MAIN_MODELS) / row.model_path / WEIGHTS
    outside = tmp_path / "elsewhere.safetensors"
    path.rename(outside)
    path.symlink_to(outside)
    with refused("bad_path"):
        store.load_version(row)


@pytest.mark.django_db
def test_a_version_without_files_and_weights_that_are_not_finite_are_refused() -> None:
    with refused("missing_file"):
        store.load_version(MainModelVersion(version="aivo-main-v1", sequence=1))
    weights = make_weights(SMALL, 0)
    weights["difficulty_output/bias"] = np.full(10, np.inf, np.float32)
    with refused("bad_file"):
        store.write_version_files(
            version="aivo-main-v1", spec=SMALL, weights=weights, encoder=small_fit().encoder,
            content_mix=0.0, metrics={}, lineage={}, card="",
        )  # fmt: skip


def test_an_unfinished_version_does_not_stand_in_the_way_of_the_next_try() -> None:
    common = {
        "version": "aivo-main-v1",
        "spec": SMALL,
        "encoder": small_fit().encoder,
        "content_mix": 0.0,
        "lineage": {},
        "card": "",
    }
    first = store.write_version_files(weights=make_weights(SMALL, 0), metrics={}, **common)  # type: ignore[arg-type]
    again = store.write_version_files(weights=make_weights(SMALL, 0), metrics={}, **common)  # type: ignore[arg-type]
    other = store.write_version_files(weights=make_weights(SMALL, 1), metrics={}, **common)  # type: ignore[arg-type]
    assert first == again
    assert (first.model_path, other.model_path) == ("aivo-main-v1", "aivo-main-v1.2")
