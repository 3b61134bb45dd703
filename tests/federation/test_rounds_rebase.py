"""Moving learners' own models to a new base version."""

from __future__ import annotations

import numpy as np
import pytest
from django.core.files.storage import storages
from django.db import connection
from django.test.utils import CaptureQueriesContext
from hypothesis import given
from hypothesis import strategies as st

from federation.rounds import rebase, service
from federation.rounds.errors import RoundSkipped, RoundStopped
from federation.rounds.own_samples import samples_of
from learners.models import Interaction, Learner
from models_store import store
from models_store.evaluation import learner_losses
from models_store.forecasting import forecast
from models_store.models import PersonalizedModel
from models_store.versions import active_version
from tests.federation.rounds_world import ShrinkingEngine, World, make_world, train_personally
from tests.models_store.factories import SMALL, add_events, events_of, make_version

pytestmark = pytest.mark.django_db


@pytest.fixture
def promoted(engine: ShrinkingEngine) -> World:
    """A world whose round has promoted a version, its learners' models still on the old one."""
    world = make_world()
    assert service.aggregate(with_rebase=False)["state"] == "PROMOTED"
    return world


def tails() -> dict[str, np.ndarray]:
    rows = PersonalizedModel.objects.select_related("learner")
    return {model.learner.learner_id: store.read_tail(model=model, spec=SMALL) for model in rows}


def test_each_model_becomes_new_main_plus_lambda_times_its_own_difference(promoted: World) -> None:
    old, new = store.load_version(promoted.version), store.load_version(active_version())
    before = tails()
    files = {model.weights_path: model.weights_sha256 for model in PersonalizedModel.objects.all()}

    report = rebase.rebase_models(target=active_version())

    assert report.rebased == 6 and sum(report.by_lambda.values()) == 6
    for model in PersonalizedModel.objects.select_related("learner", "source_version"):
        entry = model.metadata["rebases"][-1]
        own = before[model.learner.learner_id] - old.tail
        moved = store.read_tail(model=model, spec=SMALL)
        np.testing.assert_allclose(moved, new.tail + entry["lambda"] * own, atol=1e-6)
        assert model.status == "ACTIVE" and model.source_version == active_version() and model.version == 3
        assert (entry["from"], entry["to"]) == (old.version, new.version)
        assert files[entry["previous_weights_path"]] == entry["previous_weights_sha256"]
        assert storages["learner_models"].exists(entry["previous_weights_path"])


def test_lambda_is_the_best_on_the_latest_fifth_of_the_training_samples(promoted: World) -> None:
    old, new = store.load_version(promoted.version), store.load_version(active_version())
    before = tails()
    rebase.rebase_models(target=active_version())
    for model in PersonalizedModel.objects.select_related("learner"):
        entry = model.metadata["rebases"][-1]
        samples = samples_of(model.learner, new)
        training = np.flatnonzero(samples.position < 0.7 * samples.events)
        chosen_on = samples.take(training[-int(np.ceil(len(training) / 5)) :])
        own = before[model.learner.learner_id].astype(np.float64) - old.tail
        losses = {}
        for factor in (1.0, 0.5, 0.0):
            tail = (new.tail + factor * own).astype(np.float32)
            losses[factor] = learner_losses("k", forecast(new, tail, chosen_on), chosen_on, new.content_mix).total
        assert entry["lambda"] == min(losses, key=losses.__getitem__)
        assert entry["losses"]["0.5"] == pytest.approx(losses[0.5], abs=1e-5)
        assert (entry["samples"], entry["basis"]) == (len(chosen_on), "fitted")


@pytest.mark.parametrize(
    ("losses", "expected", "blend"),
    [
        ({"0": 3.0, "0.1": 2.9, "0.3": 2.8, "0.5": 3.1, "1": 3.2}, 0.0, 0.0),
        ({"0": 3.0, "0.1": 2.9, "0.3": 2.7, "0.5": 2.8, "1": 3.2}, 0.5, 0.6),
        ({"0": 3.0, "0.1": 2.9, "0.3": 2.9, "0.5": 2.8, "1": 2.8}, 1.0, 0.3),
    ],
)
def test_what_the_tail_had_not_seen_when_the_blend_was_chosen_chooses_lambda_too(
    promoted: World, losses: dict[str, float], expected: float, blend: float
) -> None:
    """The tail fits the samples it was trained on; and what is served keeps its distance from main."""
    evidence = {"held_out_samples": 7, "losses": {key: {"total": value} for key, value in losses.items()}}
    PersonalizedModel.objects.update(serving_evidence=evidence, serving_choice="BLEND", blend=0.3)
    rebase.rebase_models(target=active_version())
    for model in PersonalizedModel.objects.all():
        entry = model.metadata["rebases"][-1]
        assert (entry["lambda"], entry["basis"], entry["samples"]) == (expected, "held_out", 7)
        assert model.blend == pytest.approx(blend)
        assert model.serving_choice == ("BLEND" if blend else "MAIN")
    service.roll_back(version=None, reason="worse", actor="steward")
    assert {model.metadata["rebases"][-1]["lambda"] for model in PersonalizedModel.objects.all()} == {1.0}  # not applied twice


def test_where_held_out_losses_choose_nobody_s_events_are_read(promoted: World) -> None:
    losses = {factor: {"total": value} for factor, value in {"0": 3.0, "0.5": 2.8, "1": 3.2}.items()}
    PersonalizedModel.objects.update(serving_evidence={"held_out_samples": 7, "losses": losses})
    with CaptureQueriesContext(connection) as queries:
        report = rebase.rebase_models(target=active_version())
    assert report.by_lambda == {"0.5": 6}
    assert not [query["sql"] for query in queries if Interaction._meta.db_table in query["sql"]]


def test_what_evaluates_never_chooses_lambda(promoted: World) -> None:
    """Other answers in the later 30 % change nothing."""
    learner = promoted.learners[0]
    samples = samples_of(learner, store.load_version(active_version()))
    chosen = rebase.latest_fifth(samples)
    learner.interactions.filter(seq__gt=0.7 * 24 + 1).update(score=0.0)
    again = rebase.latest_fifth(samples_of(learner, store.load_version(active_version())))
    np.testing.assert_array_equal(chosen.first, again.first)
    np.testing.assert_array_equal(chosen.score, again.score)


def test_rebasing_again_changes_nothing(promoted: World) -> None:
    rebase.rebase_models(target=active_version())
    before = list(PersonalizedModel.objects.order_by("pk").values())
    report = rebase.rebase_models(target=active_version())
    assert report.rebased == 0
    assert list(PersonalizedModel.objects.order_by("pk").values()) == before


def test_a_rebase_that_died_half_way_is_gone_on_with(promoted: World, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {key: tail.copy() for key, tail in rebased_tails(promoted).items()}
    real, calls = store.write_tail, []

    def dying(**values: object) -> object:
        calls.append(values)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(**values)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write_tail", dying)
    with pytest.raises(KeyboardInterrupt):
        rebase.rebase_models(target=active_version())
    assert PersonalizedModel.objects.filter(status="UPDATING").count() == 1
    monkeypatch.undo()

    report = rebase.rebase_models(target=active_version())
    assert report.rebased == 4
    assert set(PersonalizedModel.objects.values_list("status", "version")) == {("ACTIVE", 3)}
    for key, tail in tails().items():
        np.testing.assert_array_equal(tail, expected[key])


def rebased_tails(world: World) -> dict[str, np.ndarray]:
    """What an uninterrupted rebase makes, computed without writing."""
    old, new = store.load_version(world.version), store.load_version(active_version())
    made = {}
    for learner in world.learners:
        tail = tails()[learner.learner_id]
        choice = rebase.choose_lambda(new, old_tail=old.tail, tail=tail, samples=samples_of(learner, new), evidence={})
        made[learner.learner_id] = rebase.moved_tail(new, old.tail, tail, choice.factor)
    return made


def test_a_model_in_training_is_left_for_the_next_rebase(promoted: World) -> None:
    PersonalizedModel.objects.filter(learner=promoted.learners[0]).update(status="TRAINING")
    report = rebase.rebase_models(target=active_version())
    assert report.rebased == 5 and report.skipped == {"in_training": 1}
    PersonalizedModel.objects.filter(learner=promoted.learners[0]).update(status="ACTIVE")
    assert rebase.rebase_models(target=active_version()).rebased == 1


def test_a_model_of_another_trunk_is_reported_and_left(promoted: World) -> None:
    stranger = make_version(seed=8, active=False)
    PersonalizedModel.objects.filter(learner=promoted.learners[0]).update(source_version=stranger)
    report = rebase.rebase_models(target=active_version())
    assert report.rebased == 5 and report.skipped == {"other_trunk": 1}


def test_a_learner_without_consent_to_training_is_left(promoted: World) -> None:
    Learner.objects.filter(pk=promoted.learners[0].pk).update(consent_training=False)
    assert rebase.rebase_models(target=active_version()).skipped == {"no_consent_training": 1}


def test_a_damaged_tail_is_an_error_of_that_learner_alone(promoted: World) -> None:
    model = promoted.model(0)
    storages["learner_models"].delete(model.weights_path)
    report = rebase.rebase_models(target=active_version())
    assert report.failed == {"missing_file": 1} and report.rebased == 5
    model.refresh_from_db()
    assert model.status == "ERROR" and model.weights_path in model.status_reason


def test_a_learner_without_interactions_keeps_all_of_their_own(promoted: World) -> None:
    promoted.learners[0].interactions.all().delete()
    rebase.rebase_models(target=active_version())
    entry = promoted.model(0).metadata["rebases"][-1]
    assert (entry["lambda"], entry["losses"], entry["samples"]) == (1.0, {}, 0)


def test_a_model_of_which_nothing_own_is_left_is_served_by_main(promoted: World, monkeypatch: pytest.MonkeyPatch) -> None:
    PersonalizedModel.objects.update(serving_choice="PERSONAL", blend=1.0)
    monkeypatch.setattr(rebase, "choose_lambda", lambda *_args, **_values: rebase.Choice(0.0, {}, 3))
    rebase.rebase_models(target=active_version())
    new = store.load_version(active_version())
    for model in PersonalizedModel.objects.all():
        assert (model.serving_choice, model.blend) == ("MAIN", 0.0)
        np.testing.assert_array_equal(store.read_tail(model=model, spec=SMALL), new.tail)


def test_a_rebase_after_a_rollback_moves_the_models_back_and_says_so(promoted: World) -> None:
    rebase.rebase_models(target=active_version())
    later = active_version().version
    result = service.roll_back(version=None, reason="worse", actor="steward")
    assert result["rebase"]["rebased"] == 6 and result["rebase"]["off_chain"] == {later: 6}
    assert PersonalizedModel.objects.filter(source_version=promoted.version).count() == 6


def test_a_model_left_updating_by_a_rebase_that_was_rolled_back_is_released(promoted: World) -> None:
    PersonalizedModel.objects.filter(learner=promoted.learners[0]).update(status="UPDATING")
    service.roll_back(version=None, reason="worse", actor="steward")
    assert set(PersonalizedModel.objects.values_list("status", flat=True)) == {"ACTIVE"}


def test_a_version_that_is_not_active_is_no_target(promoted: World) -> None:
    with pytest.raises(RoundSkipped) as skipped:
        rebase.rebase_models(target=promoted.version)
    assert skipped.value.code == "not_active"


def test_a_rebase_stops_when_asked_to(promoted: World) -> None:
    with pytest.raises(RoundStopped):
        rebase.rebase_models(target=active_version(), should_stop=lambda: True)


def test_sessions_after_a_rebase_count_from_the_rebased_tail(promoted: World) -> None:
    rebase.rebase_models(target=active_version())
    model = promoted.model(0)
    before = tails()[model.learner.learner_id]
    add_events(model.learner, events_of(77, 5), first_seq=100)
    session = train_personally(model, seed=70)
    delta = store.read_delta(path=session.delta_path, sha256=session.delta_sha256, spec=SMALL)
    np.testing.assert_allclose(tails()[model.learner.learner_id] - before, delta, atol=1e-6)
    assert session.base_version == active_version()


@given(factor=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 100))
def test_a_tail_equal_to_the_old_main_becomes_the_new_main(factor: float, seed: int) -> None:
    class New:
        tail = np.random.default_rng(seed).normal(size=20).astype(np.float32)

    old = np.random.default_rng(seed + 1).normal(size=20).astype(np.float32)
    np.testing.assert_array_equal(rebase.moved_tail(New(), old, old, factor), New.tail)  # type: ignore[arg-type]
