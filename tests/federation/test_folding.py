"""Many delta files into one update: the same bytes however it is done, a damaged file is named, memory stays what it is."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from django.core.files.storage import storages

from federation import strategies
from federation.rounds import folding, service
from federation.rounds.cohort import DamagedContribution, DiscountedDelta
from federation.rounds.folding import Member
from models_store import store
from models_store.delta_files import SETTLED_NANOSECONDS, SoundFiles, sound_files
from models_store.errors import StoreError
from models_store.store import DeltaFile, DeltaReader, read_part
from tests.federation.rounds_world import make_world, train_personally
from tests.models_store.factories import SMALL

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        "checksum_mismatch",
    ),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "checksum_mismatch"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() * 100), "bad_file"),
    "gone": (lambda path: path.unlink(), "missing_file"),
}


def delta(row: int) -> np.ndarray:
    return np.random.default_rng(row).normal(scale=0.01, size=SMALL.tail_size).astype(np.float32)


def make_members(count: int, *, sessions: int = 1) -> list[Member]:
    members = []
    for row in range(count):
        files = [
            store.write_delta(learner_id=f"m-{row}", session_id=str(n), spec=SMALL, delta=delta(1000 * n + row))
            for n in range(sessions)
        ]
        parts = tuple(DiscountedDelta(DeltaFile(f.path, f.sha256), 0.5**n) for n, f in enumerate(files))
        members.append(Member(UUID(int=row), UUID(int=row), 1.0 + row % 7, parts))
    return members


def place_of(member: Member) -> Path:
    return Path(storages[store.LEARNER_MODELS].path(member.deltas[0].file.path))


def combined(members: list[Member], name: str, threads: int) -> np.ndarray:
    strategy = strategies.get(name)
    if isinstance(strategy, strategies.CoordinateStrategy):
        return folding.combine_members(members, strategy=strategy, spec=SMALL, threads=threads).vector
    return folding.fold_members(members, strategy=strategies.get_fold(name), spec=SMALL, threads=threads).finish().vector


@pytest.mark.parametrize("sessions", [1, 2])
@pytest.mark.parametrize("name", strategies.names())
def test_files_threads_and_arrays_give_the_same_bytes(name: str, sessions: int) -> None:
    members = make_members(150, sessions=sessions)
    rows = np.stack([sum((0.5**n * delta(1000 * n + r).astype(np.float64) for n in range(sessions)), 0.0) for r in range(150)])
    weights = np.array([member.weight for member in members])
    parameters = {"weight_cap": 1.0} if name == "weighted" else {}
    expected = strategies.get(name).aggregate(rows.astype(np.float32), weights, **parameters)
    for threads in (1, 2, 5):
        assert combined(members, name, threads).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["fedavg", "median"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_first_damaged_file_among_many_is_named(name: str, damage: str) -> None:
    members = make_members(200)
    spoil, code = DAMAGES[damage]
    for row in (171, 130):
        spoil(place_of(members[row]))
    with pytest.raises(DamagedContribution, match=members[130].deltas[0].file.path) as error:
        combined(members, name, 3)
    assert (error.value.contribution, error.value.code) == (members[130].contribution, code)
    sound = [member for row, member in enumerate(members) if row not in (130, 171)]
    kept = [row for row in range(200) if row not in (130, 171)]
    weights = [1.0 + row % 7 for row in kept]
    expected = strategies.get(name).aggregate(np.stack([delta(row) for row in kept]), weights)
    assert combined(sound, name, 3).tobytes() == expected.tobytes()


def test_shards_of_whole_blocks_give_the_same_bytes() -> None:
    members = make_members(150)
    strategy = strategies.get_fold("fedavg")
    merged = strategy.start(SMALL.tail_size)
    for first in (2, 0, 1):
        shard = folding.fold_members(members[64 * first : 64 * first + 64], strategy=strategy, spec=SMALL, first_block=first)
        merged.add_blocks(shard.parts())
    assert merged.finish().vector.tobytes() == combined(members, "fedavg", 1).tobytes()


def test_a_file_that_changes_after_it_was_verified_is_found() -> None:
    member = make_members(1)[0]
    place = place_of(member)
    verified = DeltaReader(SMALL).verify(member.deltas[0].file)
    np.testing.assert_array_equal(read_part(verified, 3, 9, spec=SMALL), delta(0)[3:9])
    os.utime(place, ns=(1, 1))
    np.testing.assert_array_equal(read_part(verified, 3, 9, spec=SMALL), delta(0)[3:9])
    for spoil, code in DAMAGES.values():
        sound = place.read_bytes()
        spoil(place)
        with pytest.raises(StoreError) as error:
            read_part(verified, 3, 9, spec=SMALL)
        assert error.value.code == code
        place.write_bytes(sound)


def test_a_reader_takes_files_of_either_order_of_tensors() -> None:
    from aivo_core.tensors import write_tensors

    reader = DeltaReader(SMALL)
    plain = make_members(1)[0].deltas[0].file
    turned = dict(reversed(SMALL.unflatten_tail(delta(7)).items()))
    stored = store.write_file(alias=store.LEARNER_MODELS, path="turned.safetensors", data=write_tensors(turned))
    for _ in range(2):
        np.testing.assert_array_equal(reader.read(plain), delta(0))
        np.testing.assert_array_equal(reader.read(DeltaFile(stored.path, stored.sha256)), delta(7))
    verified = reader.verify(DeltaFile(stored.path, stored.sha256))
    assert verified.data_start is None
    np.testing.assert_array_equal(read_part(verified, 5, 8, spec=SMALL), delta(7)[5:8])


@pytest.mark.parametrize("name", ["fedavg", "weighted"])
def test_the_memory_of_a_fold_does_not_grow_with_the_members(name: str) -> None:
    members = make_members(64) * 10  # the same files again: only how many are read counts
    settle()
    combined(members[:64], name, 2)  # which files are sound is remembered before anything is measured
    peaks = []
    for count in (128, 640):
        tracemalloc.start()
        combined(members[:count], name, 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000, peaks
    assert peaks[1] < 30 * 8 * SMALL.tail_size + 2_000_000, peaks


def test_the_memory_of_a_rule_on_coordinates_is_bounded() -> None:
    strategy = strategies.get("median")
    assert isinstance(strategy, strategies.CoordinateStrategy)
    source = folding.MemberDeltas(make_members(64) * 10, spec=SMALL, threads=1)
    tracemalloc.start()
    strategy.combine(source, block_bytes=200_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000 < source.count * source.dim * 4


@pytest.mark.parametrize("strategy", ["median", "trimmed_mean"])
@pytest.mark.django_db
def test_a_round_takes_the_coordinate_wise_middle_and_rejects_what_was_damaged_meanwhile(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from federation.models import Contribution, RoundAttempt

    policy = {"contribution_source": "sessions", "strategy": strategy, "minimum_learners": 3, "guarded_metrics": {"total": 1e6}}
    world = make_world(learners=6, sessions=False, policy=policy)
    sessions = {row: train_personally(world.model(row), delta=delta(row)) for row in range(6)}
    real = folding.combine_members

    def damaged_before(*args: object, **values: object) -> object:
        path = Path(storages[store.LEARNER_MODELS].path(sessions[2].delta_path))
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        return real(*args, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(folding, "combine_members", damaged_before)
    result = service.aggregate(with_rebase=False)

    assert (result["accepted"], result["rejected"]) == (5, {"checksum_mismatch": 1})
    refused = Contribution.objects.get(subject_key=world.learners[2].subject_key)
    assert sessions[2].delta_path in refused.reason
    attempt = RoundAttempt.objects.exclude(aggregate_path="").get()
    aggregate = store.read_aggregate(path=attempt.aggregate_path, sha256=attempt.aggregate_sha256, spec=SMALL)
    rows = np.stack([delta(row) for row in (0, 1, 3, 4, 5)])
    np.testing.assert_array_equal(aggregate, strategies.get(strategy).aggregate(rows, np.ones(5)))


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what was summed."""
    from models_store import files

    counted: list[int] = []
    checksum = files.checksum

    def counting(data: bytes | memoryview) -> str:
        counted.append(len(data))
        return checksum(data)

    monkeypatch.setattr(files, "checksum", counting)
    return counted


def settle() -> None:
    """Wait until a file that was written before counts as settled."""
    time.sleep(2 * SETTLED_NANOSECONDS / 1e9)


def test_a_file_that_this_process_has_verified_is_not_summed_again_while_it_is_unchanged(sums: list[int]) -> None:
    members = make_members(5)
    settle()
    sums.clear()
    first = combined(members, "fedavg", 1)
    assert len(sums) == 5
    assert combined(members, "fedavg", 1).tobytes() == first.tobytes()
    assert len(sums) == 5
    sound_files.forget()
    combined(members, "fedavg", 1)
    assert len(sums) == 10


def test_a_file_that_was_just_written_is_summed_every_time(sums: list[int]) -> None:
    members = make_members(3)
    sums.clear()
    DeltaReader(SMALL).read(members[2].deltas[0].file)
    DeltaReader(SMALL).read(members[2].deltas[0].file)
    assert len(sums) == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_after_a_file_was_verified_is_found_even_under_its_old_time(damage: str) -> None:
    members = make_members(3)
    settle()
    combined(members, "fedavg", 1)
    path = place_of(members[1])
    before = path.stat()
    change, code = DAMAGES[damage]
    change(path)
    if path.exists():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DamagedContribution) as refused:
        combined(members, "fedavg", 1)
    assert (refused.value.contribution, refused.value.code) == (members[1].contribution, code)


def test_only_so_many_files_are_remembered() -> None:
    known = SoundFiles(most=2)
    for number in range(3):
        known.remember(DeltaFile(str(number), ""), (0, number, 0, 0, 0), read_at=time.time_ns())
    assert [known.identity(DeltaFile(str(number), "")) for number in range(3)] == [None, (0, 1, 0, 0, 0), (0, 2, 0, 0, 0)]
