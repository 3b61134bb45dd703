"""What comes in: a verdict with its reason for every contribution, and no trace of the rejected ones."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pytest
from django.core.files.storage import storages
from django.db import IntegrityError, transaction
from django.utils import timezone

from aivo_core.tensors import write_tensors
from federation.models import AggregationRound, Contribution, ModelTrainingSession, RoundAttempt, RoundState
from federation.rounds import intake, running, service
from federation.rounds.errors import RoundSkipped
from learners.models import Learner
from models_store import store
from models_store.models import MainModelVersion
from models_store.versions import active_version
from tests.federation.rounds_world import ShrinkingEngine, World, make_delta, make_world, set_policy, train_personally
from tests.models_store.factories import SMALL, make_version

pytestmark = pytest.mark.django_db

SESSIONS = {"contribution_source": "sessions"}


def bad_world(spoil: Callable[[World], None], *, learners: int = 6) -> World:
    """A world whose first learner's session is spoilt; five others are sound."""
    world = make_world(learners=learners, policy=SESSIONS)
    spoil(world)
    return world


def session_of(world: World, index: int = 0) -> ModelTrainingSession:
    return ModelTrainingSession.objects.get(personalized_model__learner=world.learners[index])


def replace_delta(session: ModelTrainingSession, data: bytes) -> None:
    """A delta file with its right checksum, whatever is in it."""
    path = session.delta_path.replace(".safetensors", "-b.safetensors")
    stored = store.write_file(alias=store.LEARNER_MODELS, path=path, data=data)
    ModelTrainingSession.objects.filter(pk=session.pk).update(delta_path=stored.path, delta_sha256=stored.sha256)


def tensors(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return {**{t.name: np.full(t.shape, 0.001, np.float32) for t in SMALL.tail_tensors}, **changes}


def last_tensor_with(value: float) -> Callable[[World], None]:
    """Bad only in the last number of the last tensor."""
    last = SMALL.tail_tensors[-1]

    def spoil(world: World) -> None:
        array = np.full(last.shape, 0.001, np.float32)
        array.flat[-1] = value
        replace_delta(session_of(world), write_tensors(tensors(**{last.name: array})))

    return spoil


def without_last(world: World) -> None:
    data = tensors()
    data.pop(SMALL.tail_tensors[-1].name)
    replace_delta(session_of(world), write_tensors(data))


def broadcastable(world: World) -> None:
    last = SMALL.tail_tensors[-1]
    replace_delta(session_of(world), write_tensors(tensors(**{last.name: np.full((1,), 0.001, np.float32)})))


def of_whole_numbers(world: World) -> None:
    last = SMALL.tail_tensors[-1]
    replace_delta(session_of(world), write_tensors(tensors(**{last.name: np.zeros(last.shape, np.int64)})))


def missing_file(world: World) -> None:
    storages["learner_models"].delete(session_of(world).delta_path)


def flipped_byte(world: World) -> None:
    storage, name = storages["learner_models"], session_of(world).delta_path
    with storage.open(name) as file:
        data = bytearray(file.read())
    data[-1] ^= 1
    storage.delete(name)
    store.write_file(alias=store.LEARNER_MODELS, path=name, data=bytes(data))


def samples(count: int) -> Callable[[World], None]:
    return lambda world: train(world, samples=count)


def train(world: World, *, samples: int) -> None:
    ModelTrainingSession.objects.filter(pk=session_of(world).pk).update(samples=samples)


def huge(world: World) -> None:
    replace_delta(session_of(world), write_tensors({t.name: np.full(t.shape, 50.0, np.float32) for t in SMALL.tail_tensors}))


def outlier(world: World) -> None:
    set_policy(norm_outlier_factor=2.0)
    big = make_delta(1) * 100
    replace_delta(session_of(world), write_tensors(SMALL.unflatten_tail(big)))


SPOILT: dict[str, tuple[Callable[[World], None], str]] = {
    "NaN": (last_tensor_with(np.nan), "not_finite"),
    "infinite": (last_tensor_with(-np.inf), "not_finite"),
    "1e38": (last_tensor_with(1e38), "norm_too_large"),
    "a tensor is missing": (without_last, "wrong_name"),
    "shape (1,)": (broadcastable, "wrong_shape"),
    "whole numbers": (of_whole_numbers, "wrong_dtype"),
    "no file": (missing_file, "missing_file"),
    "one bit flipped": (flipped_byte, "checksum_mismatch"),
    "a billion samples": (samples(1_000_000_000), "implausible_samples"),
    "norm above the limit": (huge, "norm_too_large"),
    "norm far above the cohort": (outlier, "norm_outlier"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_bad_contribution_is_refused_with_its_reason_and_leaves_no_trace(what: str) -> None:
    spoil, code = SPOILT[what]
    world = bad_world(spoil)

    result = service.aggregate(with_rebase=False)

    assert result["rejected"] == {code: 1} and result["accepted"] == 5
    refused = Contribution.objects.get(subject_key=world.learners[0].subject_key)
    assert refused.verdict == ("QUARANTINED" if code == "norm_outlier" else "REJECTED")
    assert refused.reason and refused.weight == 0.0
    sound = [
        store.read_delta(path=s.delta_path, sha256=s.delta_sha256, spec=SMALL)
        for s in (session_of(world, i) for i in range(1, 6))
    ]
    attempt = RoundAttempt.objects.get()
    made = store.read_aggregate(path=attempt.aggregate_path, sha256=attempt.aggregate_sha256, spec=SMALL)
    np.testing.assert_allclose(made, np.mean(sound, axis=0), atol=1e-7)
    assert not session_of(world).contributed_to_federation


def test_a_zero_delta_is_a_sound_contribution() -> None:
    zeros = {t.name: np.zeros(t.shape, np.float32) for t in SMALL.tail_tensors}
    bad_world(lambda world: replace_delta(session_of(world), write_tensors(zeros)))
    result = service.aggregate(with_rebase=False)
    assert result["accepted"] == 6 and result["rejected"] == {}


def test_a_round_with_too_few_sound_contributions_is_skipped_and_main_stays() -> None:
    world = bad_world(last_tensor_with(np.nan), learners=5)
    before = snapshot()

    with pytest.raises(RoundSkipped) as skipped:
        service.aggregate()

    assert skipped.value.code == "too_few_learners"
    assert skipped.value.result["rejected"] == {"not_finite": 1}
    assert AggregationRound.objects.get().state == RoundState.SKIPPED
    assert snapshot() == before and active_version() == world.version
    assert MainModelVersion.objects.count() == 1


def snapshot() -> dict[str, bytes]:
    storage = storages["main_models"]
    folder = active_version().model_path
    return {name: storage.open(f"{folder}/{name}").read() for name in storage.listdir(folder)[1]}


@pytest.mark.parametrize("how", ["withdrawn", "no_consent_contribution", "erased"])
def test_consent_withdrawn_while_the_round_runs_stops_the_contribution(
    how: str, engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After intake has accepted it, right before the aggregate is made."""
    world = make_world(learners=6)
    aggregate = running.STEPS[RoundState.AGGREGATING]

    def withdraw_then(run: running.RoundRun) -> None:
        assert Contribution.objects.filter(verdict="ACCEPTED").count() == 6
        learner = Learner.objects.filter(pk=world.learners[2].pk)
        if how == "erased":
            learner.delete()
        elif how == "withdrawn":
            learner.update(withdrawn_at=timezone.now())
        else:
            learner.update(consent_contribution=False)
        aggregate(run)

    monkeypatch.setitem(running.STEPS, RoundState.AGGREGATING, withdraw_then)
    result = service.aggregate(with_rebase=False)

    assert result["state"] == RoundState.PROMOTED
    assert result["accepted"] == 5 and result["rejected"] == {how: 1}
    assert RoundAttempt.objects.get().contributions == 5


def test_a_learner_cannot_be_in_a_round_twice(engine: ShrinkingEngine) -> None:
    make_world()
    service.aggregate(with_rebase=False)
    one = Contribution.objects.first()
    assert one is not None
    with pytest.raises(IntegrityError), transaction.atomic():
        Contribution.objects.create(round=one.round, subject_key=one.subject_key)


def test_a_session_of_another_learner_is_refused(engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    check = running.STEPS[RoundState.INTAKE]

    def swap_then(run: running.RoundRun) -> None:
        rows = {row.subject_key: row for row in Contribution.objects.all()}
        one, two = (rows[world.learners[i].subject_key] for i in (0, 1))
        one.sessions.set(two.sessions.all())
        check(run)

    monkeypatch.setitem(running.STEPS, RoundState.INTAKE, swap_then)
    result = service.aggregate(with_rebase=False)
    assert result["rejected"] == {"foreign_session": 1} and result["accepted"] == 5


def test_a_delta_of_another_lineage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(policy=SESSIONS)
    stranger = make_version(seed=9, active=False)
    check = running.STEPS[RoundState.INTAKE]

    def move_then(run: running.RoundRun) -> None:
        ModelTrainingSession.objects.filter(pk=session_of(world).pk).update(base_version=stranger)
        check(run)

    monkeypatch.setitem(running.STEPS, RoundState.INTAKE, move_then)
    assert service.aggregate(with_rebase=False)["rejected"] == {"wrong_lineage": 1}


def test_a_learner_whose_training_fails_is_rejected_and_the_round_goes_on(engine: ShrinkingEngine) -> None:
    world = make_world(learners=6)
    set_policy(min_samples=10)
    world.learners[0].interactions.filter(seq__gt=8).delete()

    result = service.aggregate(with_rebase=False)
    assert result["accepted"] == 5 and result["rejected"] == {"too_few_samples": 1}


def test_a_file_that_breaks_between_intake_and_aggregation_begins_a_new_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(policy=SESSIONS)
    aggregate = running.STEPS[RoundState.AGGREGATING]

    def break_then(run: running.RoundRun) -> None:
        flipped_byte(world)
        aggregate(run)

    monkeypatch.setitem(running.STEPS, RoundState.AGGREGATING, break_then)
    result = service.aggregate(with_rebase=False)

    assert result["accepted"] == 5 and result["rejected"] == {"checksum_mismatch": 1}
    first, second = RoundAttempt.objects.order_by("n")
    assert (first.aggregate_path, second.contributions) == ("", 5)
    assert first.set_digest != second.set_digest


def test_quarantine_again_changes_nothing() -> None:
    world = bad_world(outlier)
    service.aggregate(with_rebase=False)
    round_ = AggregationRound.objects.get()
    before = list(Contribution.objects.values_list("subject_key", "verdict", "reason"))
    intake.quarantine_outliers(round_, running.RoundPolicy.from_json(round_.policy))
    assert list(Contribution.objects.values_list("subject_key", "verdict", "reason")) == before
    assert world.learners[0].subject_key in {row[0] for row in before if row[1] == "QUARANTINED"}


def test_sessions_too_old_for_a_round_still_count_when_the_learner_trained_again() -> None:
    """What counts for staleness is the learner's last session; everything not contributed goes in."""
    world = make_world(learners=5, policy=SESSIONS)
    ModelTrainingSession.objects.update(created_at=timezone.now() - timedelta(days=30))
    for index in range(5):
        train_personally(world.model(index), seed=50 + index)
    result = service.aggregate(with_rebase=False)
    assert result["accepted"] == 5
    assert ModelTrainingSession.objects.filter(contributed_to_federation=True).count() == 10
