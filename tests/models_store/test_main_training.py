"""Main training from interactions to a published version, once per data, recipe and seed; with real Keras on a small net."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.files.storage import storages
from django.core.management import CommandError, call_command

from aivo_site.errors import UsageError
from learners.models import Learner, Pool
from models_store import store
from models_store.errors import MainTrainingError, PreparationError, TrainingInterrupted
from models_store.main_training import MainTrainingReport, train_main
from models_store.models import MainModelVersion, VersionStatus
from models_store.training import MainModelTrainer, TrainingData
from models_store.verification import verify_store
from models_store.version_writer import version_writer
from models_store.versions import publish
from tests.models_store.factories import add_events, events_of, make_learner, small_fit
from tests.synthetic_samples import make_samples

pytestmark = pytest.mark.django_db(transaction=True)

HIDDEN = (16, 12, 8)


@pytest.fixture
def curriculum() -> None:
    for index in range(18):
        add_events(make_learner(f"c-{index}", pool=Pool.CURRICULUM), events_of(index, 16))
    for index in range(3):
        add_events(make_learner(f"e-{index}", pool=Pool.EVALUATION), events_of(100 + index, 20))


def train(**options: Any) -> MainTrainingReport:
    values: dict[str, Any] = {"epochs": 2, "batch_size": 64, "hidden_layers": HIDDEN, "actor": "test", **options}
    return train_main(**values)


def root() -> Path:
    return Path(storages[store.MAIN_MODELS].location)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("curriculum")
def test_the_first_version_is_measured_published_and_active() -> None:
    steps: list[tuple[int, int, str]] = []
    report = train(progress=lambda done, total, message: steps.append((done, total, message)))
    row = report.row
    assert (row.version, row.status, report.created) == ("aivo-main-v1", VersionStatus.ACTIVE, True)
    result = report.to_json()
    assert set(result["metrics"]["content"]) == {"top1", "top5", "log_loss"}
    assert set(result["metrics"]["difficulty"]) == {"auc", "log_loss", "brier", "calibration_gap", "worst_bin"}
    assert set(result["metrics"]["path"]) == {"top1", "log_loss"}
    assert {"most_frequent", "repeat_last", "markov_category", "markov_item", "item_mean", "elo"} <= set(result["baselines"])
    # The later 30 % of 20 events of three learners.
    assert result["evaluated_on"] == {"learners": 3, "samples": 18}
    assert {"accuracy", "loss", "epochs", "samples"} <= set(row.training_metrics)
    loaded = store.load_version(row)
    assert loaded.spec.hidden_layers == HIDDEN
    assert loaded.content_mix == row.content_mix == result["content_mix"]
    assert (store.read_active_pointer() or {})["version"] == row.version
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert steps[-1][:2] == (5, 5)
    report_of_store = verify_store()
    assert report_of_store.is_sound
    assert report_of_store.orphaned == []
    card = (root() / row.model_path / "MODEL_CARD.md").read_text()
    assert "Intended use" in card
    assert not any(learner in card for learner in Learner.objects.values_list("learner_id", flat=True))


@pytest.mark.usefixtures("curriculum")
def test_training_the_same_twice_gives_one_version_and_another_seed_a_candidate() -> None:
    first = train()
    again = train()
    assert (again.row.pk, again.created) == (first.row.pk, False)
    assert again.to_json()["metrics"] == first.to_json()["metrics"]
    other = train(seed=1)
    assert (other.row.version, other.row.status) == ("aivo-main-v2", VersionStatus.CANDIDATE)
    assert MainModelVersion.objects.get(version="aivo-main-v1").status == VersionStatus.ACTIVE


@pytest.mark.usefixtures("curriculum")
def test_an_interrupted_training_goes_on_under_the_same_version() -> None:
    calls = 0

    def stop_in_the_second_epoch() -> bool:
        nonlocal calls
        calls += 1
        return bool(list(root().glob("checkpoints/*")))

    with pytest.raises(TrainingInterrupted):
        train(epochs=3, should_stop=stop_in_the_second_epoch)
    row = MainModelVersion.objects.get()
    assert row.status == VersionStatus.TRAINING
    assert verify_store().orphaned == []
    report = train(epochs=3)
    assert (report.row.pk, report.resumed_from) == (row.pk, 1)
    assert list(root().glob("checkpoints/*")) == []
    whole = store.load_version(report.row).weights_sha256

    MainModelVersion.objects.all().delete()
    assert train(epochs=3).to_json()["sha256"] == whole


@pytest.mark.usefixtures("curriculum")
def test_a_version_whose_activation_was_cut_off_is_made_active_by_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("models_store.main_training.activate", killed)
    with pytest.raises(KeyboardInterrupt):
        train()
    monkeypatch.undo()
    assert MainModelVersion.objects.get().status == VersionStatus.CANDIDATE
    report = train()
    assert (report.created, report.row.status) == (False, VersionStatus.ACTIVE)


@pytest.mark.usefixtures("curriculum")
def test_of_two_processes_with_the_same_training_the_second_returns_the_version_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def publish_after_another(**options: Any) -> None:
        publish(**{**options, "row": MainModelVersion.objects.get()})
        publish(**options)

    monkeypatch.setattr("models_store.main_training.publish", publish_after_another)
    report = train()
    assert (report.created, report.row.version, report.row.status) == (False, "aivo-main-v1", VersionStatus.ACTIVE)
    assert MainModelVersion.objects.count() == 1


@pytest.mark.usefixtures("curriculum")
def test_without_evaluation_learners_who_consent_training_is_refused_before_it_begins() -> None:
    Learner.objects.filter(pool=Pool.EVALUATION).update(pool=Pool.FEDERATED)
    silent = make_learner("silent", pool=Pool.EVALUATION)
    with pytest.raises(PreparationError) as caught:
        train()
    assert caught.value.code == "no_evaluation_learners"
    assert not MainModelVersion.objects.exists()
    assert Learner.objects.filter(pool=Pool.EVALUATION).get() == silent


@pytest.mark.usefixtures("curriculum")
def test_a_training_that_diverges_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MainTrainingError) as caught:
        train(learning_rate=1e30)
    assert caught.value.code == "diverged"
    assert MainModelVersion.objects.get().status == VersionStatus.TRAINING


def test_a_model_trained_by_hand_is_saved_as_a_new_candidate() -> None:
    trainer = MainModelTrainer(input_dim=256, hidden_layers=HIDDEN, learning_rate=1e-3, epochs=1, batch_size=64)
    samples = make_samples(trainer.spec, 60, 1)
    result = trainer.train(TrainingData(training=samples, validation=make_samples(trainer.spec, 30, 2)))
    row = trainer.save_model(result, version_writer(encoder=small_fit().encoder))
    assert (row.version, row.status, row.training_metrics["epochs"]) == ("aivo-main-v1", VersionStatus.CANDIDATE, 1)
    assert store.load_version(row).weights["content_output/bias"].tobytes() == result.weights["content_output/bias"].tobytes()
    again = trainer.save_model(result, version_writer(encoder=small_fit().encoder, parent=row))
    assert (again.version, again.parent) == ("aivo-main-v2", row)
    assert verify_store().is_sound


@pytest.mark.parametrize("options", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"seed": -1}])
def test_a_value_outside_its_range_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        train(**options)


@pytest.mark.parametrize(
    "arguments",
    [["--epochs", "0"], ["--learning-rate", "-1"], ["--learning-rate", "nan"], ["--batch-size", "1"], ["--seed", "-1"]],
)
def test_the_command_exits_with_2_on_a_wrong_value(arguments: list[str]) -> None:
    with pytest.raises(CommandError, match=arguments[0]) as caught:
        call_command("train_main_model", *arguments, stdout=StringIO(), stderr=StringIO())
    assert caught.value.returncode == 2


@pytest.mark.slow
@pytest.mark.usefixtures("curriculum")
def test_the_command_trains_the_real_network_and_shows_model_and_baselines_side_by_side() -> None:
    out = StringIO()
    call_command("train_main_model", "--epochs", "1", "--json", stdout=out, stderr=StringIO())
    result = json.loads(out.getvalue())
    assert {"version", "sha256", "metrics", "baselines", "evaluated_on", "by_history", "epochs", "seconds"} <= set(result)
    text = StringIO()
    call_command("train_main_model", "--epochs", "1", stdout=text, stderr=StringIO())
    for name in ("this model", "most frequent", "repeat last", "markov category", "markov item", "item mean", "elo"):
        assert name in text.getvalue()
    assert "trained before" in text.getvalue()
