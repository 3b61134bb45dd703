"""Provisioning: the configuration decides first, then the learner; nothing stands in for what failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from django.conf import Settings
from django.core.files.storage import storages
from django.utils import timezone

from learners.consents import record_consent
from learners.models import ConsentKind, Learner, Organisation, Pool
from models_store.clones import base_of
from models_store.errors import NoMainModel
from models_store.models import Backend, PersonalizedModel
from models_store.provisioning import AivoModelCloner, LearnerProfile, ProvisioningError
from models_store.tail_files import read_tail
from models_store.verification import verify_store
from tests.models_store.factories import make_learner, make_version

pytestmark = pytest.mark.django_db


@pytest.fixture
def configure(settings: Settings) -> Any:
    def set_to(*, federated: bool, key: str = "") -> None:
        settings.USE_FEDERATED_LEARNING = federated
        settings.OPENAI_API_KEY = key

    set_to(federated=True)
    return set_to


def refusal(profile: Any) -> str:
    with pytest.raises(ProvisioningError) as caught:
        AivoModelCloner().clone_model(profile)
    return caught.value.code


def consent(learner_id: str) -> None:
    learner = Learner.objects.get(learner_id=learner_id)
    record_consent(learner=learner, kind=ConsentKind.TRAINING, given=True, authority="guardian, letter", recorded_by="test")


def damage_weights(version: Any) -> tuple[Path, bytes]:
    path = Path(storages["main_models"].location) / version.model_path / "weights.safetensors"  # type: ignore[attr-defined]
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return path, whole


def test_without_any_configuration_the_message_names_both_settings_before_looking_at_the_learner(configure: Any) -> None:
    configure(federated=False)
    with pytest.raises(ProvisioningError, match=r"USE_FEDERATED_LEARNING.*OPENAI_API_KEY") as caught:
        AivoModelCloner().clone_model({"nonsense": 1})
    assert caught.value.code == "not_configured"
    assert not Learner.objects.exists()


def test_with_a_main_model_the_learner_gets_a_clone_and_the_decision_is_kept(configure: Any) -> None:
    version = make_version()
    learner = make_learner("ada-1")
    provisioned = AivoModelCloner().clone_model({"learner_id": "ada-1"})
    model = PersonalizedModel.objects.get(learner=learner)
    assert provisioned.created and provisioned.model == model
    assert (model.status, model.backend, model.source_version) == ("ACTIVE", "FEDERATED", version)
    assert model.metadata["federatedLearning"] is True
    assert model.configuration["provisioning"] == provisioned.decision.to_json()
    assert provisioned.decision.reason_code == "federated_learning" and provisioned.decision.main_version == version.version
    base = base_of(model)
    assert read_tail(model=model, spec=base.spec).tobytes() == base.tail.tobytes()
    assert Path(provisioned.cloned_model_path).is_file()
    report = verify_store()
    assert (report.missing, report.corrupt, report.orphaned) == ([], [], [])


def test_provisioning_again_changes_nothing(configure: Any) -> None:
    make_version()
    make_learner("ada-1")
    first = AivoModelCloner().clone_model({"learner_id": "ada-1"})
    before = PersonalizedModel.objects.values().get()
    again = AivoModelCloner().clone_model({"learner_id": "ADA-1"})
    assert not again.created and again.decision == first.decision
    assert PersonalizedModel.objects.values().get() == before


def test_an_unknown_learner_is_registered_and_gets_a_model_once_consent_is_recorded(configure: Any) -> None:
    make_version()
    Organisation.objects.create(slug="north", name="North")
    profile = LearnerProfile("new-1", organisation="north", grade_band="K-2", needs=["dyslexia"], language="en")
    assert refusal(profile) == "no_consent_training"
    learner = Learner.objects.get(learner_id="new-1")
    assert (learner.organisation.slug, learner.pool, learner.grade_band) == ("north", Pool.FEDERATED, "K-2")
    assert learner.profile == {"needs": ["dyslexia"], "language": "en"}
    assert not learner.consent_training and not PersonalizedModel.objects.exists()
    consent("new-1")
    assert AivoModelCloner().clone_model(profile).created


def test_any_dataclass_with_the_fields_is_a_profile_and_a_known_learner_is_not_overwritten(configure: Any) -> None:
    @dataclass
    class FromTheApp:
        learner_id: str
        grade_band: str = "9-12"
        needs: list[str] = field(default_factory=list)
        language: str | None = None

    make_version()
    make_learner("ada-1", grade_band="K-2")
    assert AivoModelCloner().clone_model(FromTheApp("ada-1")).created
    assert Learner.objects.get().grade_band == "K-2"


@pytest.mark.parametrize(
    ("profile", "code"),
    [
        (7, "bad_profile"),
        ({}, "bad_profile"),
        ({"learner_id": ""}, "bad_profile"),
        ({"learner_id": 5}, "bad_profile"),
        ({"learner_id": "a", "name": "Ada"}, "bad_profile"),
        ({"learner_id": "a", "needs": "dyslexia"}, "bad_profile"),
        ({"learner_id": "a", "needs": ["two words"]}, "bad_profile"),
        ({"learner_id": "../a"}, "bad_learner_id"),
        ({"learner_id": "a\0b"}, "bad_learner_id"),
        ({"learner_id": "a" * 65}, "bad_learner_id"),
        ({"learner_id": "a", "organisation": "nowhere"}, "unknown_organisation"),
        ({"learner_id": "a", "grade_band": "x" * 33}, "bad_grade_band"),
        ({"learner_id": "taken", "organisation": "south"}, "learner_exists"),
    ],
)
def test_a_bad_profile_is_refused_and_changes_nothing(configure: Any, profile: Any, code: str) -> None:
    make_version()
    make_learner("taken")
    assert refusal(profile) == code
    assert Learner.objects.count() == 1 and not PersonalizedModel.objects.exists()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"consent_training": False}, "no_consent_training"),
        ({"withdrawn_at": timezone.now()}, "withdrawn"),
        ({"pool": Pool.CURRICULUM}, "wrong_pool"),
    ],
)
def test_who_may_have_no_model_gets_none(configure: Any, fields: dict[str, Any], code: str) -> None:
    make_version()
    make_learner("ada-1", **fields)
    assert refusal({"learner_id": "ada-1"}) == code
    assert not PersonalizedModel.objects.exists()


def test_a_model_made_before_the_consent_ended_is_not_given_out(configure: Any) -> None:
    make_version()
    make_learner("ada-1")
    AivoModelCloner().clone_model({"learner_id": "ada-1"})
    Learner.objects.update(consent_training=False)
    assert refusal({"learner_id": "ada-1"}) == "no_consent_training"


def test_without_a_main_model_and_without_a_key_it_says_how_to_get_one(configure: Any) -> None:
    with pytest.raises(NoMainModel, match="train_main_model"):
        AivoModelCloner().clone_model({"learner_id": "ada-1"})
    assert not Learner.objects.exists()


@pytest.mark.parametrize("federated", [True, False])
def test_where_fine_tuning_is_decided_it_is_said_not_to_be_there_and_nothing_is_done_instead(
    configure: Any, federated: bool
) -> None:
    if not federated:
        make_version()
    configure(federated=federated, key="sk-test")
    make_learner("ada-1")
    assert refusal({"learner_id": "ada-1"}) == "legacy_not_available"
    assert refusal({"learner_id": "unknown"}) == "legacy_not_available"
    assert Learner.objects.count() == 1 and not PersonalizedModel.objects.exists()


def test_a_damaged_main_model_is_a_failure_to_retry_and_no_reason_for_fine_tuning(configure: Any) -> None:
    version = make_version()
    configure(federated=True, key="sk-test")
    make_learner("ada-1")
    path, whole = damage_weights(version)
    assert refusal({"learner_id": "ada-1"}) == "checksum_mismatch"
    model = PersonalizedModel.objects.get()
    assert (model.status, model.backend, model.weights_path) == ("FAILED", "FEDERATED", "")
    assert "weights.safetensors" in model.status_reason
    path.write_bytes(whole)
    assert AivoModelCloner().clone_model({"learner_id": "ada-1"}).created
    model.refresh_from_db()
    assert (model.status, model.status_reason) == ("ACTIVE", "")


@pytest.mark.parametrize("fields", [{"pool": Pool.EVALUATION}, {"consent_training": False}])
def test_who_may_have_no_model_has_no_failed_one_either(configure: Any, fields: dict[str, Any]) -> None:
    damage_weights(make_version())
    make_learner("ada-1", **fields)
    assert refusal({"learner_id": "ada-1"}) == "checksum_mismatch"
    assert not PersonalizedModel.objects.exists()


def test_a_fine_tuned_model_stays_what_it_is(configure: Any) -> None:
    make_version()
    learner = make_learner("ada-1")
    PersonalizedModel.objects.create(learner=learner, backend=Backend.OPENAI_FINE_TUNING, model_id="ft:x", status="ACTIVE")
    provisioned = AivoModelCloner().clone_model({"learner_id": "ada-1"})
    assert not provisioned.created and provisioned.decision.reason_code == "decided_before"
    assert provisioned.model.backend == Backend.OPENAI_FINE_TUNING and provisioned.cloned_model_path == ""
