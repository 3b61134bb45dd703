"""Clones: who gets one, that they are independent, and how they are measured."""

from __future__ import annotations

import json
import threading
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from django.core.files.storage import storages
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils import timezone

from aivo_core.network import NetworkSpec
from aivo_site.audit.models import AuditEvent
from aivo_site.errors import UsageError
from aivo_site.jobs.models import Job, JobState
from learners.models import Learner, Pool
from models_store import store
from models_store.clones import base_of, compare, extract_delta
from models_store.cloning import ModelCloner, clone_learners, save_tail
from models_store.errors import CloneError, NoMainModel, VersionConflict
from models_store.models import Backend, PersonalizedModel, PersonalizedModelStatus
from models_store.verification import verify_store
from tests.models_store.factories import SMALL, events_of, make_learner, make_version, random_tail, small_fit
from tests.synthetic_samples import make_weights

pytestmark = pytest.mark.django_db(transaction=True)

BLOCK_1 = ("shared_dense_1", "shared_bn_1")


def root(alias: str) -> Path:
    return Path(storages[alias].location)  # type: ignore[attr-defined]


def model_of(learner: Learner) -> PersonalizedModel:
    return PersonalizedModel.objects.select_related("source_version", "learner").get(learner=learner)


def clone(*learners: Learner, **options: object) -> dict[str, object]:
    report = clone_learners(learners=learners, actor="test", **options)  # type: ignore[arg-type]
    return {"cloned": report.cloned, "skipped": dict(report.skipped), "failed": dict(report.failed)}


def test_a_clone_begins_as_the_main_models_tail() -> None:
    version = make_version()
    learner = make_learner("Ada.1")
    assert clone(learner) == {"cloned": 1, "skipped": {}, "failed": {}}
    model = model_of(learner)
    assert (model.status, model.serving_choice, model.blend, model.version) == ("ACTIVE", "MAIN", 0.0, 1)
    assert model.source_version == version
    assert model.metadata == {"federatedLearning": True, "freeze_layers": list(SMALL.freeze_layers), "rebases": []}
    assert store.read_tail(model=model, spec=SMALL).tobytes() == store.load_version(version).tail.tobytes()
    assert verify_store().is_sound


def test_cloning_again_changes_nothing() -> None:
    make_version()
    learner = make_learner()
    clone(learner)
    before = PersonalizedModel.objects.values().get()
    assert clone(learner) == {"cloned": 0, "skipped": {"already_cloned": 1}, "failed": {}}
    assert PersonalizedModel.objects.values().get() == before


def test_each_learner_left_out_has_a_reason() -> None:
    make_version()
    learners = [
        make_learner(),
        make_learner(consent_training=False),
        make_learner(withdrawn_at=timezone.now()),
        make_learner(pool=Pool.CURRICULUM),
        make_learner(pool=Pool.EVALUATION),
        make_learner(),
    ]
    PersonalizedModel.objects.create(learner=learners[5], backend=Backend.OPENAI_FINE_TUNING, model_id="ft:x")
    assert clone(*learners) == {
        "cloned": 1,
        "skipped": {"no_consent_training": 1, "withdrawn": 1, "wrong_pool": 2, "other_backend": 1},
        "failed": {},
    }


def test_a_model_that_waits_for_its_clone_gets_it() -> None:
    make_version()
    learner = make_learner()
    waiting = PersonalizedModel.objects.create(learner=learner, status=PersonalizedModelStatus.PENDING)
    assert clone(learner)["cloned"] == 1
    model = model_of(learner)
    assert (model.pk, model.status) == (waiting.pk, "ACTIVE")


def test_without_a_main_model_nobody_is_cloned() -> None:
    with pytest.raises(NoMainModel):
        clone(make_learner())
    assert not PersonalizedModel.objects.exists()


def test_changing_one_clone_never_changes_another_nor_the_main_model() -> None:
    version = make_version()
    first, second = make_learner(), make_learner()
    clone(first, second)
    main = store.load_version(version).tail.copy()
    changed = main + np.float32(1.0)
    model = model_of(first)
    old_path = model.weights_path
    save_tail(model=model, spec=SMALL, tail=changed)
    assert (model.version, model.weights_path != old_path) == (2, True)
    assert store.read_tail(model=model, spec=SMALL).tobytes() == changed.tobytes()
    assert store.read_tail(model=model_of(second), spec=SMALL).tobytes() == main.tobytes()
    store.clear_loaded_versions()
    assert store.load_version(version).tail.tobytes() == main.tobytes()
    assert (root(store.LEARNER_MODELS) / old_path).is_file()


def test_of_two_new_tails_at_the_same_moment_one_is_refused() -> None:
    make_version()
    learner = make_learner()
    clone(learner)
    one, other = model_of(learner), model_of(learner)
    save_tail(model=one, spec=SMALL, tail=random_tail(SMALL, 1))
    with pytest.raises(VersionConflict):
        save_tail(model=other, spec=SMALL, tail=random_tail(SMALL, 2))
    assert model_of(learner).weights_sha256 == one.weights_sha256


def test_two_processes_that_clone_the_same_learners_make_each_clone_once() -> None:
    make_version()
    learners = [make_learner() for _ in range(30)]
    totals: list[int] = []
    barrier = threading.Barrier(2)

    def run() -> None:
        barrier.wait()
        try:
            totals.append(clone_learners(learners=learners, actor="test").cloned)
        finally:
            connection.close()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(totals) == 30
    assert PersonalizedModel.objects.filter(status="ACTIVE").count() == 30


def test_a_withdrawal_while_the_file_is_written_stops_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    from models_store import cloning

    make_version()
    learner = make_learner()
    real = cloning.write_tails

    def withdraw_meanwhile(**options: object) -> object:
        Learner.objects.filter(pk=learner.pk).update(consent_training=False)
        return real(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(cloning, "write_tails", withdraw_meanwhile)
    assert clone(learner) == {"cloned": 0, "skipped": {"no_consent_training": 1}, "failed": {}}
    assert not PersonalizedModel.objects.exists()


def test_a_learner_whose_file_cannot_be_written_does_not_stop_the_others(tmp_path: Path) -> None:
    make_version()
    bad, good = make_learner("bad"), make_learner("good")
    root(store.LEARNER_MODELS).mkdir(parents=True)
    (root(store.LEARNER_MODELS) / "id-bad").symlink_to(tmp_path, target_is_directory=True)
    assert clone(bad, good) == {"cloned": 1, "skipped": {}, "failed": {"bad_path": 1}}
    assert model_of(good).status == "ACTIVE"


def test_cloning_is_audited_by_subject_key_only() -> None:
    make_version()
    learner = make_learner("secret-name")
    clone(learner)
    event = AuditEvent.objects.get(action="learners.cloned")
    assert event.data["subject_keys"] == [str(learner.subject_key)]
    assert "secret-name" not in json.dumps(event.data)


# --- Freezing ---------------------------------------------------------------------------------------------------------


def test_a_clone_may_freeze_fewer_layers_and_then_learns_more_numbers() -> None:
    make_version()
    learner = make_learner()
    info = ModelCloner().clone_model("aivo-main-v1", "", learner.learner_id, BLOCK_1)
    spec = SMALL.with_freeze_layers(BLOCK_1)
    assert info.architecture.trainable_params == spec.tail_size > SMALL.tail_size
    assert base_of(model_of(learner)).spec == spec
    assert not extract_delta(model_of(learner)).any()


@pytest.mark.parametrize("layers", [["shared_dense_2", "shared_bn_2"], ["conv_1"], ["shared_dense_1"], ["content_output"]])
def test_a_freeze_list_that_is_no_prefix_is_refused_with_the_layers_there_are(layers: list[str]) -> None:
    make_version()
    with pytest.raises(UsageError, match="shared_dense_1"):
        clone(make_learner(), freeze_layers=layers)
    assert not PersonalizedModel.objects.exists()


def test_the_default_network_has_the_documented_trainable_numbers() -> None:
    assert NetworkSpec().tail_size == 52_586


# --- The original's interface -----------------------------------------------------------------------------------------


def test_clone_model_accepts_paths_as_the_original_does(monkeypatch: pytest.MonkeyPatch) -> None:
    version = make_version()
    make_learner("learner-123")
    monkeypatch.chdir(root(store.MAIN_MODELS).parent)
    info = ModelCloner().clone_model("./main_models", "./learner_models/learner-123", "learner-123", None)
    assert info.created
    assert info.source_version == version.version
    assert Path(info.cloned_model_path).is_file()
    assert info.architecture.trainable_params == SMALL.tail_size
    again = ModelCloner().clone_model(version.version, "", "LEARNER-123")
    assert (again.created, again.cloned_model_path) == (False, info.cloned_model_path)


def test_clone_model_refuses_what_it_cannot_do() -> None:
    make_version()
    other = make_version(seed=5)
    make_learner("ada")
    make_learner("bob", consent_training=False)
    cloner = ModelCloner()
    for arguments, code in [
        (("aivo-main-v9", "", "ada"), "unknown_version"),
        (("aivo-main-v1", "", "nobody"), "unknown_learner"),
        (("aivo-main-v1", "", "../ada"), "unknown_learner"),
        (("aivo-main-v1", "/etc", "ada"), "bad_path"),
        (("aivo-main-v1", "../elsewhere", "ada"), "bad_path"),
    ]:
        with pytest.raises(UsageError) as caught:
            cloner.clone_model(*arguments)
        assert caught.value.code == code
    with pytest.raises(CloneError) as refused:
        cloner.clone_model("aivo-main-v1", "", "bob")
    assert refused.value.code == "no_consent_training"
    cloner.clone_model("aivo-main-v1", "", "ada")
    with pytest.raises(CloneError) as refused:
        cloner.clone_model(other.version, "", "ada")
    assert refused.value.code == "already_cloned"
    assert PersonalizedModel.objects.count() == 1


# --- Measuring --------------------------------------------------------------------------------------------------------


def test_the_delta_is_against_the_recorded_base_even_after_another_version_became_active() -> None:
    version = make_version(seed=1)
    learner = make_learner()
    clone(learner)
    step = random_tail(SMALL, 3)
    base = store.load_version(version).tail
    model = model_of(learner)
    save_tail(model=model, spec=SMALL, tail=base + step)
    make_version(seed=2)
    assert extract_delta(model_of(learner)).tobytes() == ((base + step) - base).tobytes()


def test_a_model_without_a_tail_has_no_delta() -> None:
    model = PersonalizedModel.objects.create(learner=make_learner())
    with pytest.raises(CloneError) as caught:
        extract_delta(model)
    assert caught.value.code == "no_tail"


def test_comparison_measures_only_what_differs() -> None:
    version = make_version()
    learner = make_learner()
    clone(learner)
    model = model_of(learner)
    probe, _ = small_fit().encoder.encode(events_of(99))
    same = compare(version, model, probe=probe)
    assert same.whole.distance == 0.0
    assert (same.same.content, same.same.path, same.same.level) == (1.0, 1.0, 1.0)  # type: ignore[union-attr]

    tail = store.load_version(version).tail.copy()
    bias = SMALL.tail_slices()["difficulty_output/bias"]
    tail[bias] += np.linspace(-3, 3, 10, dtype=np.float32)
    save_tail(model=model, spec=SMALL, tail=tail)
    moved = compare(version, model_of(learner), probe=probe)
    assert {name for name, layer in moved.layers.items() if layer.distance} == {"difficulty_output"}
    expected = np.linalg.norm(np.linspace(-3, 3, 10))
    assert moved.layers["difficulty_output"].distance == pytest.approx(expected, rel=1e-5)
    assert -1.0 < moved.layers["difficulty_output"].cosine < 1.0
    assert (moved.same.content, moved.same.path) == (1.0, 1.0)  # type: ignore[union-attr]
    assert moved.same.level < 1.0  # type: ignore[union-attr]


def test_a_comparison_of_opposite_and_of_different_networks() -> None:
    first = make_version(seed=1)
    wide = NetworkSpec(hidden_layers=(12, 10, 9), dropout_rates=(0.1, 0.1, 0.1))
    other = make_version(spec=wide, active=False)
    with pytest.raises(CloneError) as caught:
        compare(first, other)
    assert caught.value.code == "different_architecture"
    difference = compare(first, make_version(seed=2, active=False))
    weights, others = make_weights(SMALL, 1), make_weights(SMALL, 2)
    a, b = (np.concatenate([w[t.name].ravel() for t in SMALL.head_tensors()[:2]]).astype(float) for w in (weights, others))
    assert difference.layers["content_output"].cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert difference.same is None


# --- The command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> dict[str, object]:
    out = StringIO()
    call_command("clone_learner_models", *arguments, "--json", stdout=out, stderr=StringIO())
    result: dict[str, object] = json.loads(out.getvalue())
    return result


def test_the_command_clones_the_federated_pool_as_a_job() -> None:
    make_version()
    make_learner()
    make_learner(pool=Pool.CURRICULUM)
    make_learner(consent_training=False)
    result = run()
    assert {key: result[key] for key in ("cloned", "skipped", "failed")} == {
        "cloned": 1, "skipped": {"no_consent_training": 1}, "failed": {},
    }  # fmt: skip
    assert Job.objects.get().state == JobState.SUCCEEDED


def test_a_limit_counts_learners_without_a_clone() -> None:
    make_version()
    for _ in range(5):
        make_learner()
    assert [run("--limit", "2")["cloned"] for _ in range(3)] == [2, 2, 1]


def test_one_learner_can_be_named_without_regard_to_case() -> None:
    make_version()
    make_learner("Ada")
    make_learner("Bob")
    assert run("--learner", "ada")["cloned"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--learner", "nobody"],
        ["--organisation", "nowhere"],
        ["--limit", "0"],
        ["--pool", "zoo"],
        ["--freeze-layers", "shared_dense_2"],
    ],
)
def test_wrong_usage_exits_with_2_and_changes_nothing(arguments: list[str]) -> None:
    make_version()
    make_learner()
    with pytest.raises(CommandError) as caught:
        run(*arguments)
    assert caught.value.returncode in (1, 2)
    assert not PersonalizedModel.objects.exists()
    assert not Job.objects.exists()


def test_the_command_without_a_main_model_fails_with_the_reason() -> None:
    make_learner()
    out = StringIO()
    with pytest.raises(SystemExit) as caught:
        call_command("clone_learner_models", "--json", stdout=out, stderr=StringIO())
    assert caught.value.code == 1
    assert json.loads(out.getvalue())["error"]["code"] == "no_main_model"


def test_the_command_without_any_learner_is_skipped() -> None:
    make_version()
    with pytest.raises(SystemExit) as caught:
        call_command("clone_learner_models", "--json", stdout=StringIO(), stderr=StringIO())
    assert caught.value.code == 3
