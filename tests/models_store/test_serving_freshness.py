"""A warm process: whatever another connection or process writes, the very next recommendation sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from django.db import connection, transaction

from aivo_core.encoding.events import Event
from learners.consents import record_consent
from learners.errors import UnknownName
from learners.importing import import_interactions
from learners.models import ConsentKind, EncoderState, Learner, Pool
from models_store import store
from models_store.cloning import save_tail
from models_store.models import PersonalizedModel, PersonalizedModelStatus, ServingChoice
from models_store.recommendation import Recommendation
from models_store.serving import clear_serving_cache, recommend
from models_store.versions import activate
from tests.learners.csv_files import file_of
from tests.models_store.factories import SMALL, add_events, events_of, make_version, random_tail
from tests.models_store.test_serving import give_tail, learner_with

pytestmark = pytest.mark.django_db(transaction=True)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh_caches() -> None:
    store.clear_loaded_versions()
    clear_serving_cache()


def elsewhere(write: Callable[[], object]) -> None:
    """Run ``write`` on a connection of its own."""

    def run() -> None:
        try:
            write()
        finally:
            connection.close()

    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(run).result()


def own_model() -> PersonalizedModel:
    return PersonalizedModel.objects.select_related("learner", "source_version").get(learner__learner_id="ada")


def warm() -> Recommendation:
    """A learner with an own tail that serves, asked twice."""
    make_version(seed=1)
    give_tail(learner_with(), ServingChoice.PERSONAL, 1.0)
    answer = recommend("ada")
    assert recommend("ada") == answer
    assert answer.served_by.choice == "PERSONAL"
    return answer


def cold() -> Recommendation:
    """The answer of a process that remembers nothing, from states that are replayed."""
    EncoderState.objects.all().delete()
    store.clear_loaded_versions()
    clear_serving_cache()
    return recommend("ada")


def take(line: str) -> None:
    import_interactions(source=file_of(line), pool=Pool.FEDERATED, consent=None)


def withdraw_training() -> None:
    learner = Learner.objects.get(learner_id="ada")
    record_consent(learner=learner, kind=ConsentKind.TRAINING, given=False, authority="parent", recorded_by="test")


def change_choice(choice: str, share: float) -> None:
    PersonalizedModel.objects.filter(learner__learner_id="ada").update(serving_choice=choice, blend=share)


def promote() -> None:
    row = make_version(seed=2, active=False)
    with transaction.atomic():
        activate(row=row, actor="test", reason="better")


def test_a_consent_withdrawn_elsewhere_stops_the_own_model() -> None:
    warm()
    elsewhere(withdraw_training)
    served_by = recommend("ada").served_by
    assert (served_by.choice, served_by.note) == ("MAIN", "withdrawn")


def test_a_consent_given_again_elsewhere_brings_the_own_model_back() -> None:
    before = warm()
    elsewhere(withdraw_training)
    recommend("ada")

    def give() -> None:
        learner = Learner.objects.get(learner_id="ada")
        record_consent(learner=learner, kind=ConsentKind.TRAINING, given=True, authority="parent", recorded_by="test")

    elsewhere(give)
    assert recommend("ada") == before


@pytest.mark.parametrize("line", ["ada,100,,category 1,item 1.1,1", "ada,0,,category 5,item 5.4,0"], ids=["later", "earlier"])
def test_an_interaction_imported_elsewhere_counts(line: str) -> None:
    before = warm()
    elsewhere(lambda: take(line))
    after = recommend("ada")
    assert after.events == before.events + 1
    assert after.content != before.content
    assert after == cold()


def test_an_interaction_that_comes_twice_changes_nothing() -> None:
    warm()
    elsewhere(lambda: take("ada,100,,category 1,item 1.1,1"))
    after = recommend("ada")
    elsewhere(lambda: take("ada,100,,category 1,item 1.1,1"))
    assert recommend("ada") == after


def test_a_tail_written_elsewhere_is_served() -> None:
    before = warm()
    elsewhere(lambda: save_tail(model=own_model(), spec=SMALL, tail=random_tail(SMALL, 9)))
    after = recommend("ada")
    assert after.served_by.personal_version == 3
    assert after.path_probabilities != before.path_probabilities
    assert after == cold()


@pytest.mark.parametrize(("choice", "share"), [(ServingChoice.MAIN, 0.0), (ServingChoice.BLEND, 0.5)])
def test_a_serving_choice_made_elsewhere_is_followed(choice: str, share: float) -> None:
    before = warm()
    elsewhere(lambda: change_choice(choice, share))
    after = recommend("ada")
    assert (after.served_by.choice, after.served_by.blend) == (choice, share)
    assert after.path_probabilities != before.path_probabilities
    assert after == cold()


def test_a_version_promoted_elsewhere_answers_where_main_serves_and_own_tails_keep_their_trunk() -> None:
    warm()
    learner_with(learner_id="bob")
    recommend("bob")
    elsewhere(promote)
    assert recommend("bob").served_by.main_version == "aivo-main-v2"
    assert recommend("ada").served_by.main_version == "aivo-main-v1"


def test_a_rebase_elsewhere_moves_the_own_model_to_its_new_trunk() -> None:
    warm()
    second = make_version(seed=2)

    def rebase() -> None:
        save_tail(model=own_model(), spec=SMALL, tail=random_tail(SMALL, 4), fields={"source_version": second})

    elsewhere(rebase)
    after = recommend("ada")
    assert after.served_by.main_version == second.version
    assert after == cold()


def test_another_freeze_list_is_followed() -> None:
    """A row may only get one together with a tail of its length; until then the file does not fit and main answers."""
    warm()
    model = own_model()
    freeze = [*SMALL.freeze_layers[:3]]
    PersonalizedModel.objects.filter(pk=model.pk).update(metadata={**model.metadata, "freeze_layers": freeze})
    assert recommend("ada").served_by.note == "damaged"


def test_a_model_marked_as_damaged_elsewhere_no_longer_serves() -> None:
    warm()
    elsewhere(lambda: PersonalizedModel.objects.update(status=PersonalizedModelStatus.ERROR))
    assert recommend("ada").served_by.note == "damaged"


def test_a_learner_erased_elsewhere_is_unknown() -> None:
    warm()
    elsewhere(lambda: Learner.objects.filter(learner_id="ada").delete())
    with pytest.raises(UnknownName):
        recommend("ada")


def test_a_learner_with_the_id_of_an_erased_one_starts_without_history() -> None:
    warm()
    Learner.objects.filter(learner_id="ada").delete()
    learner_with(3)
    assert recommend("ada").events == 3


def test_a_history_changed_in_a_transaction_that_is_rolled_back_leaves_nothing_behind() -> None:
    before = warm()
    learner = Learner.objects.get(learner_id="ada")
    with pytest.raises(RuntimeError), transaction.atomic():
        add_events(learner, [Event("category 1", "item 1.1", "subject 0", 0.0)], first_seq=100)
        assert recommend("ada").events == before.events + 1
        raise RuntimeError
    assert recommend("ada") == before
    add_events(learner, [Event("category 3", "item 3.2", "subject 1", 1.0)], first_seq=100)
    assert recommend("ada") == cold()


def test_a_state_stored_from_a_history_that_was_overtaken_meanwhile_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process stores an event that sorts first between this one's reading of the history and its writing of the state."""
    make_version()
    learner = learner_with(0)
    add_events(learner, events_of(50, 9), first_seq=2)
    from models_store import learner_states

    real = learner_states._store

    def store_late(*arguments: object) -> None:
        monkeypatch.setattr(learner_states, "_store", real)
        elsewhere(lambda: take("ada,1,,category 4,item 4.1,0"))
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(learner_states, "_store", store_late)
    assert recommend("ada").events == 9
    after = recommend("ada")
    assert after.events == 10
    assert after == cold()


def test_what_another_process_imports_and_decides_is_seen() -> None:
    before = warm()
    program = (
        "import io, django; django.setup()\n"
        "from learners.importing import import_interactions\n"
        "from models_store.models import PersonalizedModel\n"
        "text = b'learner_id,seq,occurred_at,category,item_id,score\\nada,200,,category 2,item 2.1,1\\n'\n"
        "report = import_interactions(source=io.BytesIO(text), pool='FEDERATED', consent=None)\n"
        "assert report.rows_imported == 1, report\n"
        "PersonalizedModel.objects.update(serving_choice='MAIN', blend=0.0)\n"
    )
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "aivo_site.settings", "DATABASE_URL": _database_url()}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    after = recommend("ada")
    assert (after.events, after.served_by.choice) == (before.events + 1, "MAIN")
    assert after == cold()


def _database_url() -> str:
    """Of the test database, for another process."""
    named = connection.settings_dict
    if connection.vendor == "sqlite":
        return f"sqlite:///{named['NAME']}"
    address = f"{named['HOST']}:{named['PORT'] or 5432}" if named["HOST"] else ""
    secret = f":{named['PASSWORD']}" if named["PASSWORD"] else ""
    return f"postgres://{named['USER']}{secret}@{address}/{named['NAME']}"
