"""Recommendations: the right model answers, from the right state, and what is missing or damaged is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from django.core.files.storage import storages
from django.db import transaction
from django.utils import timezone

from aivo_core.encoding.events import Event
from aivo_core.inference import blend
from aivo_core.ordinal import success_curve
from aivo_site.errors import UsageError
from learners.history_stamps import stamp_histories
from learners.models import EncoderState as EncoderStateRow
from learners.models import Interaction, Learner
from models_store import store
from models_store.cloning import clone_learners, save_tail
from models_store.errors import NoMainModel
from models_store.evaluation import mix_content
from models_store.learner_states import current_state
from models_store.models import PersonalizedModel, PersonalizedModelStatus, ServingChoice
from models_store.serving import clear_serving_cache, recommend
from tests.models_store.factories import SMALL, add_events, events_of, make_learner, make_version, random_tail, small_fit
from tests.synthetic_samples import logits_in_double

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def fresh_caches() -> None:
    store.clear_loaded_versions()
    clear_serving_cache()


def learner_with(count: int = 20, learner_id: str = "ada") -> Learner:
    learner = make_learner(learner_id)
    add_events(learner, events_of(50, count))
    return learner


def history(count: int) -> list[Event]:
    """The events of ``learner_with`` as the encoder sees them: no times are stored, only their order."""
    return [replace(event, seconds=None) for event in events_of(50, count)]


def give_tail(learner: Learner, choice: str, share: float) -> PersonalizedModel:
    clone_learners(learners=[learner], actor="test")
    model = PersonalizedModel.objects.select_related("source_version", "learner").get(learner=learner)
    tail = store.load_version(model.source_version).tail + random_tail(SMALL, 7) * 3  # type: ignore[arg-type]
    save_tail(model=model, spec=SMALL, tail=tail, fields={"serving_choice": choice, "blend": share})
    return model


def stamp_of(learner: Learner) -> UUID:
    return Learner.objects.values_list("history_stamp", flat=True).get(pk=learner.pk)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return np.asarray(shifted / shifted.sum())


def test_the_answer_is_that_of_the_network_computed_layer_by_layer() -> None:
    version = make_version(content_mix=0.2)
    events = history(20)
    learner_with()
    answer = recommend("ada", target=0.6)
    loaded = store.load_version(version)
    encoder = loaded.encoder
    state = encoder.encode(events)[1]
    prediction = encoder.prediction(state)
    first = logits_in_double(SMALL, loaded.weights, prediction.first[None])
    content = mix_content(softmax(first["content_output"][0]), prediction.content_prior.astype(float), 0.2)
    slot = int(content[: len(encoder.categories)].argmax())
    second = logits_in_double(SMALL, loaded.weights, encoder.second_pass(prediction, state, slot)[None])
    difficulty = softmax(second["difficulty_output"][0])
    np.testing.assert_allclose(answer.content, content, atol=1e-5)
    np.testing.assert_allclose(answer.path_probabilities, softmax(first["path_output"][0]), atol=1e-5)
    np.testing.assert_allclose(answer.difficulty, difficulty, atol=1e-5)
    np.testing.assert_allclose(answer.success, success_curve(difficulty), atol=1e-5)
    assert answer.category == encoder.categories[slot]
    assert answer.level == int(np.abs(success_curve(difficulty) - 0.6).argmin()) + 1
    assert answer.success_probability == answer.success[answer.level - 1]
    assert (answer.basis, answer.events, answer.served_by.choice) == ("learner", 20, "MAIN")
    assert answer.served_by.main_version == version.version


def test_a_learner_without_events_gets_the_curriculums_rates() -> None:
    make_version()
    make_learner("new")
    answer = recommend("new")
    encoder = small_fit().encoder
    assert answer.basis == "curriculum"
    np.testing.assert_allclose(answer.content, encoder.base_rates, atol=1e-6)
    np.testing.assert_allclose(answer.success, encoder.success_by_level)
    assert (answer.path, answer.path_probabilities, answer.difficulty, answer.why) == (None, None, None, ())
    assert answer.category == encoder.categories[int(encoder.base_rates[:127].argmax())]
    assert not EncoderStateRow.objects.exists()


def test_one_event_is_enough_for_an_answer_about_the_learner() -> None:
    make_version()
    learner_with(1)
    assert recommend("ada").basis == "learner"


def test_a_category_and_an_item_never_seen_before_do_not_fail() -> None:
    make_version()
    learner = make_learner("ada")
    add_events(learner, [Event("never seen", "unknown item", "unknown subject", 1.0)] * 3)
    answer = recommend("ada")
    assert answer.events == 3
    assert answer.category in small_fit().encoder.categories


def test_without_a_main_model_there_is_no_recommendation() -> None:
    learner_with()
    with pytest.raises(NoMainModel):
        recommend("ada")


@pytest.mark.parametrize("learner_id", ["nobody", "../ada", "", "a\0"])
def test_an_unknown_learner_is_refused(learner_id: str) -> None:
    make_version()
    with pytest.raises(UsageError) as caught:
        recommend(learner_id)
    assert caught.value.code == "unknown_learner"


@pytest.mark.parametrize("target", [0.0, 1.0, -0.5, float("nan")])
def test_a_target_outside_0_to_1_is_refused(target: float) -> None:
    make_version()
    learner_with()
    with pytest.raises(UsageError, match="target"):
        recommend("ada", target=target)


def test_a_target_out_of_reach_is_said_to_be_so() -> None:
    make_version()
    learner_with()
    low, high = recommend("ada", target=0.001), recommend("ada", target=0.999)
    assert low.level >= high.level
    for answer in (low, high):
        assert answer.target_reached == (abs(answer.success_probability - answer.target) <= 0.1)
    assert low.above_target is not False
    assert high.above_target is not True


# --- Which model answers ----------------------------------------------------------------------------------------------


def test_a_personal_model_answers_where_it_was_chosen() -> None:
    make_version()
    learner = learner_with()
    main = recommend("ada")
    model = give_tail(learner, ServingChoice.PERSONAL, 1.0)
    own = recommend("ada")
    assert (own.served_by.choice, own.served_by.personal_version) == ("PERSONAL", 2)
    loaded = store.load_version(model.source_version)  # type: ignore[arg-type]
    weights = SMALL.with_tail(loaded.weights, store.read_tail(model=model, spec=SMALL))
    prediction = loaded.encoder.prediction(loaded.encoder.encode(history(20))[1])
    expected = softmax(logits_in_double(SMALL, weights, prediction.first[None])["path_output"][0])
    np.testing.assert_allclose(own.path_probabilities, expected, atol=1e-5)
    assert own.path_probabilities != main.path_probabilities


def test_a_blend_is_made_of_raw_tails() -> None:
    make_version()
    learner = learner_with()
    model = give_tail(learner, ServingChoice.BLEND, 0.3)
    answer = recommend("ada")
    loaded = store.load_version(model.source_version)  # type: ignore[arg-type]
    tail = blend(loaded.tail, store.read_tail(model=model, spec=SMALL), 0.3)
    prediction = loaded.encoder.prediction(loaded.encoder.encode(history(20))[1])
    logits = logits_in_double(SMALL, SMALL.with_tail(loaded.weights, tail), prediction.first[None])
    np.testing.assert_allclose(answer.path_probabilities, softmax(logits["path_output"][0]), atol=1e-5)
    assert (answer.served_by.choice, answer.served_by.blend) == ("BLEND", 0.3)


def test_a_model_that_is_not_better_leaves_the_answer_to_main() -> None:
    make_version()
    learner = learner_with()
    before = recommend("ada")
    give_tail(learner, ServingChoice.MAIN, 0.0)
    assert recommend("ada") == before


def test_a_new_tail_is_served_at_once() -> None:
    make_version()
    learner = learner_with()
    model = give_tail(learner, ServingChoice.PERSONAL, 1.0)
    before = recommend("ada")
    save_tail(model=model, spec=SMALL, tail=random_tail(SMALL, 8))
    after = recommend("ada")
    assert after.served_by.personal_version == 3
    assert after.path_probabilities != before.path_probabilities


def test_a_newly_active_version_serves_at_once_and_a_personal_model_stays_on_its_own_trunk() -> None:
    first = make_version(seed=1)
    learner_with()
    own = learner_with(learner_id="bob")
    give_tail(own, ServingChoice.PERSONAL, 1.0)
    bob = recommend("bob")
    second = make_version(seed=2)
    assert recommend("ada").served_by.main_version == second.version
    again = recommend("bob")
    assert again.served_by.main_version == first.version
    assert again == bob


def test_a_damaged_tail_is_marked_and_main_answers_meanwhile() -> None:
    version = make_version()
    learner = learner_with()
    model = give_tail(learner, ServingChoice.PERSONAL, 1.0)
    path = Path(storages[store.LEARNER_MODELS].location) / model.weights_path  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:-1])
    answer = recommend("ada")
    assert (answer.served_by.choice, answer.served_by.note) == ("MAIN", "damaged")
    assert answer.served_by.main_version == version.version
    model.refresh_from_db()
    assert model.status == PersonalizedModelStatus.ERROR
    assert "sha256" in model.status_reason
    assert recommend("ada") == answer


def test_withdrawal_stops_the_personal_model_at_once() -> None:
    make_version()
    learner = learner_with()
    give_tail(learner, ServingChoice.PERSONAL, 1.0)
    Learner.objects.filter(pk=learner.pk).update(withdrawn_at=timezone.now())
    assert recommend("ada").served_by.note == "withdrawn"


def test_a_warm_recommendation_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    make_version()
    learner = learner_with()
    give_tail(learner, ServingChoice.PERSONAL, 1.0)
    expected = recommend("ada")

    def no_file(*arguments: object, **options: object) -> bytes:
        raise AssertionError("a file was read")

    monkeypatch.setattr("models_store.files.read_unverified", no_file)
    monkeypatch.setattr("models_store.local_files.read", no_file)
    assert recommend("ada") == expected


def test_a_process_that_serves_holds_linear_algebra_to_one_thread() -> None:
    from ctypes import CDLL

    from aivo_core.engine import blas

    def library(verb: str) -> Callable[..., int]:
        loaded = [CDLL(path) for path in sorted(set(blas._loaded())) if "numpy.libs" in path]
        found: Callable[..., int] = next(getattr(each, f"scipy_openblas_{verb}_num_threads64_") for each in loaded)
        return found

    make_version()
    learner_with()
    try:
        library("set")(2)
        assert library("get")() == 2
        recommend("ada")
        assert library("get")() == 1
    finally:
        blas.use_one_thread()


def test_a_warm_recommendation_needs_one_query(django_assert_max_num_queries: object) -> None:
    make_version()
    learner = learner_with()
    give_tail(learner, ServingChoice.PERSONAL, 1.0)
    recommend("ada")
    with django_assert_max_num_queries(1):  # type: ignore[operator]
        recommend("ada")


# --- The learner's state ----------------------------------------------------------------------------------------------


def test_new_events_are_encoded_on_top_of_the_stored_state_as_if_all_had_come_at_once() -> None:
    make_version()
    events = history(30)
    learner = make_learner("ada")
    encoder = small_fit().encoder
    for start, stop in ((0, 10), (10, 11), (11, 30)):
        add_events(learner, events[start:stop], first_seq=start + 1)
        recommend("ada")
        row = EncoderStateRow.objects.get()
        assert (row.events, row.last_seq) == (stop, stop)
    assert current_state(learner.pk, stamp_of(learner), encoder).to_json() == encoder.encode(events)[1].to_json()


def test_only_new_events_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    make_version()
    learner = learner_with(20)
    recommend("ada")
    encoder = small_fit().encoder
    encoded: list[int] = []
    real = type(encoder).encode

    def count(self: object, events: list[Event], state: object = None) -> object:
        encoded.append(len(events))
        return real(self, events, state)  # type: ignore[arg-type]

    monkeypatch.setattr(type(encoder), "encode", count)
    recommend("ada")
    assert encoded == []
    add_events(learner, events_of(51, 2), first_seq=21)
    recommend("ada")
    assert encoded == [2]


def test_a_state_that_no_longer_fits_the_history_is_replayed() -> None:
    make_version()
    learner = make_learner("ada")
    events = history(12)
    add_events(learner, events[:4], first_seq=1)
    add_events(learner, events[5:], first_seq=6)
    recommend("ada")
    # An event that sorts before the last encoded one, stored without anybody dropping the state.
    add_events(learner, events[4:5], first_seq=5)
    recommend("ada")
    encoder = small_fit().encoder
    assert current_state(learner.pk, stamp_of(learner), encoder).to_json() == encoder.encode(events)[1].to_json()
    assert EncoderStateRow.objects.get().events == 12


def test_a_stored_state_that_cannot_be_read_is_replayed() -> None:
    make_version()
    learner = learner_with(8)
    expected = recommend("ada")
    EncoderStateRow.objects.update(state={"format": 99})
    clear_serving_cache()
    assert recommend("ada") == expected
    with transaction.atomic():
        stamp_histories([learner.pk])
        Interaction.objects.filter(seq=8).delete()
    assert recommend("ada").events == 7


# --- Why --------------------------------------------------------------------------------------------------------------


def test_the_explanation_names_each_feature_group_once_the_strongest_first() -> None:
    make_version()
    learner_with()
    why = recommend("ada").why
    assert {part.group for part in why} == {"content", "subject", "learner", "session"}
    strength = [max(abs(part.category), abs(part.success)) for part in why]
    assert strength == sorted(strength, reverse=True)
    assert strength[0] > 0.0
