"""Preparation: who is read, how the split falls, and that the same data are prepared once."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from django.core.files.storage import storages
from django.core.management import call_command
from django.utils import timezone

from aivo_site.audit.models import AuditEvent
from learners.models import Interaction, Learner, Pool
from models_store import store
from models_store.curriculum import read_curriculum, shared_model_learners
from models_store.errors import PreparationError
from models_store.models import CurriculumPreparation
from models_store.preparing import prepare_curriculum, read_prepared_encoder
from models_store.verification import verify_store
from tests.models_store.factories import add_events, events_of, make_learner

pytestmark = pytest.mark.django_db(transaction=True)


def make_pool(count: int, pool: str = Pool.CURRICULUM, *, first: int = 0, events: int = 8) -> list[Learner]:
    learners = [make_learner(f"{pool.lower()}-{index:02d}", pool=pool) for index in range(first, first + count)]
    for index, learner in enumerate(learners, start=first):
        add_events(learner, events_of(index, events))
    return learners


def prepare() -> CurriculumPreparation:
    return prepare_curriculum(actor="test").row


def test_the_same_data_are_prepared_once() -> None:
    make_pool(20)
    first = prepare_curriculum(actor="test")
    again = prepare_curriculum(actor="test")
    assert (first.created, again.created) == (True, False)
    assert (first.row.pk, first.set_aside, again.set_aside) == (again.row.pk, 2, 0)
    assert CurriculumPreparation.objects.count() == 1
    assert read_prepared_encoder(first.row).sha256 == first.row.encoder_sha256
    assert verify_store().is_sound


@pytest.mark.parametrize("change", ["an event more", "another score", "a learner more", "a withdrawal"])
def test_other_data_are_prepared_anew(change: str) -> None:
    learners = make_pool(20)
    make_pool(2, Pool.EVALUATION)
    before = prepare()
    if change == "an event more":
        add_events(learners[3], events_of(99, 1), first_seq=100)
    elif change == "another score":
        row = Interaction.objects.filter(learner=learners[3]).earliest("seq")
        Interaction.objects.filter(pk=row.pk).update(score=0.5)
    elif change == "a learner more":
        make_pool(1, first=50)
    else:
        Learner.objects.filter(pk=learners[3].pk).update(withdrawn_at=timezone.now())
    assert prepare().data_sha256 != before.data_sha256
    assert CurriculumPreparation.objects.count() == 2


def test_an_empty_evaluation_pool_gets_a_tenth_of_the_curriculum_once() -> None:
    make_pool(30)
    report = prepare_curriculum(actor="olga")
    assert report.set_aside == 3
    assert dict(report.learners) == {"CURRICULUM": 27, "FEDERATED": 0, "EVALUATION": 3}
    moved = set(shared_model_learners(Pool.EVALUATION).values_list("learner_id", flat=True))
    event = AuditEvent.objects.get(action="learners.set_aside_for_evaluation")
    assert (event.actor, len(event.data["subject_keys"])) == ("olga", 3)
    make_pool(10, first=40)
    assert prepare_curriculum(actor="olga").set_aside == 0
    assert set(shared_model_learners(Pool.EVALUATION).values_list("learner_id", flat=True)) == moved


def test_an_evaluation_pool_without_consent_is_not_filled_up() -> None:
    make_pool(20)
    Learner.objects.filter(pk=make_pool(1, Pool.EVALUATION)[0].pk).update(consent_contribution=False)
    assert prepare_curriculum(actor="olga").set_aside == 0
    assert Learner.objects.filter(pool=Pool.CURRICULUM).count() == 20


def test_who_is_set_aside_depends_on_the_ids_only() -> None:
    make_pool(30)
    prepare()
    first = set(Learner.objects.filter(pool=Pool.EVALUATION).values_list("learner_id", flat=True))
    Learner.objects.all().delete()
    for index in reversed(range(30)):
        make_pool(1, first=index, events=5)
    prepare()
    assert set(Learner.objects.filter(pool=Pool.EVALUATION).values_list("learner_id", flat=True)) == first


def test_training_validation_and_evaluation_learners_are_disjoint_and_only_consenting_ones() -> None:
    make_pool(40)
    refused = make_pool(3, first=60)
    Learner.objects.filter(pk__in=[learner.pk for learner in refused[:2]]).update(consent_contribution=False)
    Learner.objects.filter(pk=refused[2].pk).update(withdrawn_at=timezone.now())
    make_learner("silent", pool=Pool.CURRICULUM)
    make_pool(2, Pool.FEDERATED)
    row = prepare()
    training, validation = set(row.training_keys), set(row.validation_keys)
    evaluation = {str(key) for key in shared_model_learners(Pool.EVALUATION).values_list("subject_key", flat=True)}
    assert not training & validation
    assert not (training | validation) & evaluation
    assert len(training | validation | evaluation) == 40
    assert 1 <= len(validation) <= 10
    assert not {str(learner.subject_key) for learner in refused} & (training | validation | evaluation)
    assert row.report["excluded"] == {"withdrawn": 1, "no_consent_contribution": 2, "too_few_interactions": 1}
    assert row.report["samples"] == 7 * 36


def test_a_learner_stays_on_its_side_of_the_split_when_others_come() -> None:
    make_pool(40)
    make_pool(1, Pool.EVALUATION)
    before = {history.learner_id for history in read_curriculum().validation}
    make_pool(20, first=50)
    after = read_curriculum()
    old = {history.learner_id for history in after.validation if history.learner_id < "curriculum-50"}
    assert old == before or len(before) == 1


def test_without_curriculum_learners_the_message_says_what_is_missing() -> None:
    with pytest.raises(PreparationError, match="--pool CURRICULUM --consent contribution") as caught:
        prepare()
    assert caught.value.code == "no_curriculum_learners"
    for learner in make_pool(10):
        Learner.objects.filter(pk=learner.pk).update(consent_contribution=False)
    with pytest.raises(PreparationError, match="no_consent_contribution: 10"):
        prepare()
    assert Learner.objects.filter(pool=Pool.EVALUATION).count() == 0


def test_too_few_learners_are_refused_and_nobody_is_moved() -> None:
    make_pool(4)
    with pytest.raises(PreparationError, match="5 curriculum learners") as caught:
        prepare()
    assert caught.value.code == "too_few_learners"
    assert Learner.objects.filter(pool=Pool.EVALUATION).count() == 0
    make_pool(1, first=10)
    assert len(prepare().training_keys) == 3


def test_a_damaged_encoder_is_fitted_and_written_again() -> None:
    make_pool(12)
    row = prepare()
    path = Path(storages[store.MAIN_MODELS].location) / row.path / "encoder.safetensors"  # type: ignore[attr-defined]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert prepare().pk == row.pk
    assert path.read_bytes() == whole
    path.unlink()
    prepare()
    assert path.read_bytes() == whole


def test_the_command_prints_its_contract() -> None:
    make_pool(20)
    out = StringIO()
    call_command("prepare_curriculum_data", "--json", stdout=out, stderr=StringIO())
    result = json.loads(out.getvalue())
    assert {"learners", "samples", "categories", "overflow_share", "encoder_sha256", "seconds"} <= set(result)
    assert result["learners"] == {"CURRICULUM": 18, "FEDERATED": 0, "EVALUATION": 2}
    text = StringIO()
    call_command("prepare_curriculum_data", stdout=text, stderr=StringIO())
    assert "fitted before" in text.getvalue()
