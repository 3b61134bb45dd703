from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aivo_core.inference import fold
from aivo_core.network import NetworkError, NetworkSpec
from aivo_core.ordinal import score_log_loss
from aivo_core.samples import Samples
from models_store.keras_network import read_weights
from models_store.training import MainModelTrainer, TrainingData, TrainingError, TrainingResult, TrainingStopped
from models_store.training_checkpoint import CheckpointError, EpochRecord, FileCheckpoint, decode_state, encode_state
from models_store.training_run import RowBatch
from tests.synthetic_samples import make_samples, softmax_in_double

WIDTH = 12
SPEC = NetworkSpec(input_dim=WIDTH, hidden_layers=(16, 8), dropout_rates=(0.3, 0.2), freeze_layers=())
DATA = TrainingData(training=make_samples(SPEC, 150, 1), validation=make_samples(SPEC, 40, 2))


def trainer(**changes: Any) -> MainModelTrainer:
    arguments = {"input_dim": WIDTH, "hidden_layers": (16, 8), "learning_rate": 3e-3, "epochs": 4, "batch_size": 64, "seed": 7}
    return MainModelTrainer(**{**arguments, **changes})


NOISE = np.random.default_rng(0)
HOPELESS = replace(
    DATA,
    validation=replace(DATA.validation, content=NOISE.integers(0, 128, 40), path=NOISE.integers(0, 32, 40)),
)


@cache
def usual_result() -> TrainingResult:
    return trainer().train(DATA)


def as_bytes(result: TrainingResult) -> bytes:
    return b"".join(result.weights[tensor.name].tobytes() for tensor in result.spec.tensors)


def without_seconds(history: tuple[EpochRecord, ...]) -> list[EpochRecord]:
    return [replace(record, seconds=0.0) for record in history]


def validation_losses(result: TrainingResult, samples: Samples) -> tuple[float, float, float]:
    network = fold(result.spec, result.weights)
    first, second = network.forward(samples.first), network.forward(samples.second)
    everyone = np.arange(len(samples))
    ordinal = [score_log_loss(out.difficulty, samples.level, samples.score).mean() for out in (first, second)]
    content = -np.log(first.content[everyone, samples.content]).mean()
    path = -np.log(first.path[everyone, samples.path]).mean()
    return float(content), float(np.mean(ordinal)), float(path)


class Interrupted(Exception):
    pass


def interrupt_after(epoch: int) -> Any:
    def on_epoch(record: EpochRecord) -> None:
        if record.epoch == epoch:
            raise Interrupted

    return on_epoch


def test_two_trainings_with_one_seed_give_the_same_bytes_and_another_seed_others() -> None:
    first, again, other = usual_result(), trainer().train(DATA), trainer(seed=8, epochs=1).train(DATA)
    assert as_bytes(first) == as_bytes(again)
    assert without_seconds(first.history) == without_seconds(again.history)
    assert first.history[0].loss != other.history[0].loss


def test_training_learns_and_reports_what_it_did() -> None:
    seen: list[EpochRecord] = []
    result = trainer(epochs=6).train(DATA, on_epoch=seen.append)
    assert tuple(seen) == result.history and result.epochs == len(seen) <= 6
    assert result.history[-1].loss < result.history[0].loss
    assert [record.epoch for record in seen] == list(range(1, len(seen) + 1))
    assert result.seconds == pytest.approx(sum(record.seconds for record in seen))
    assert result.best.validation_loss == min(record.validation_loss for record in seen)
    assert result.spec.input_dim == WIDTH and result.spec.frozen_blocks == 1
    assert set(result.weights) == {tensor.name for tensor in result.spec.tensors}


def test_reported_validation_losses_are_those_of_the_returned_weights() -> None:
    result = usual_result()
    expected = validation_losses(result, DATA.validation)
    np.testing.assert_allclose(result.best.validation, expected, atol=2e-5)
    assert result.best.validation_loss == pytest.approx(expected[0] + 2 * expected[1] + expected[2], abs=1e-4)


def test_the_first_batchs_loss_is_each_heads_mean_over_its_own_rows_times_its_weight() -> None:
    one = trainer(epochs=1, batch_size=512, dropout_rates=(0.0, 0.0), loss_weights=(1.0, 2.0, 0.5))
    w = {k: v.astype(float) for k, v in read_weights(one.build_model(), SPEC).items()}
    s = DATA.training
    hidden = np.concatenate([s.first, s.second]).astype(float)
    for i in (1, 2):
        hidden = np.maximum(hidden @ w[f"shared_dense_{i}/kernel"] + w[f"shared_dense_{i}/bias"], 0)
        hidden = (hidden - hidden.mean(axis=0)) / np.sqrt(hidden.var(axis=0) + 1e-3)
    p = {h.name: softmax_in_double(hidden @ w[f"{h.name}/kernel"] + w[f"{h.name}/bias"]) for h in SPEC.heads}
    everyone = np.arange(len(s))
    content = -np.log(p["content_output"][everyone, s.content]).mean()
    path = -np.log(p["path_output"][everyone, s.path]).mean()
    ordinal = score_log_loss(p["difficulty_output"], np.tile(s.level, 2), np.tile(s.score, 2)).mean()
    assert one.train(DATA).history[0].loss == pytest.approx(content + 2 * ordinal + 0.5 * path, rel=1e-5)


def test_a_batch_holds_the_asked_rows_and_counts_only_the_real_ones() -> None:
    s = DATA.training
    n = len(s)
    index = np.array([n + 3, 5, 9, n + 5, 2, n + 1])
    rows, first, counted, content, path, level, score = RowBatch(s, 8).gather(index, 4)
    assert rows.shape == (6, WIDTH)
    got = {(bytes(row), bool(f), bool(c)) for row, f, c in zip(rows, first, counted, strict=True)}
    asked = {(bytes((s.first if r < n else s.second)[r % n]), bool(r < n), i < 4) for i, r in enumerate(index)}
    assert got == asked
    order = [5, 9, 2, 3, 5, 1]
    for values, whole in ((content, s.content), (path, s.path), (level, s.level), (score, s.score)):
        np.testing.assert_array_equal(values, whole[order])


def test_learning_rate_and_stopping_follow_kerass_callbacks() -> None:
    import keras

    result = trainer(epochs=40, learning_rate=2e-2).train(HOPELESS)

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.Adam(2e-2))
    plateau = keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.4)
    stopping = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
    for callback in (plateau, stopping):
        callback.set_model(model)
        callback.on_train_begin()
    for number, record in enumerate(result.history):
        assert not model.stop_training
        assert record.learning_rate == pytest.approx(float(model.optimizer.learning_rate.numpy()), rel=1e-6)
        logs = {"val_loss": record.validation_loss}
        stopping.on_epoch_end(number, dict(logs))
        plateau.on_epoch_end(number, dict(logs))
    assert model.stop_training and result.epochs < 40
    assert result.best_epoch == stopping.best_epoch + 1 == result.epochs - 3
    assert len({record.learning_rate for record in result.history}) > 1
    np.testing.assert_allclose(result.best.validation, validation_losses(result, HOPELESS.validation), atol=1e-4)


@pytest.mark.parametrize("epoch", [1, 4])
def test_a_training_interrupted_after_an_epoch_goes_on_to_the_same_bytes(tmp_path: Path, epoch: int) -> None:
    # The plateau acts before and after the interruption.
    arguments = {"epochs": 6, "learning_rate": 2e-2, "patience": 6}
    whole = trainer(**arguments).train(HOPELESS)
    assert len({record.learning_rate for record in whole.history}) > 2
    checkpoint = FileCheckpoint(tmp_path / "below" / "training.safetensors")
    with pytest.raises(Interrupted):
        trainer(**arguments).train(HOPELESS, checkpoint=checkpoint, on_epoch=interrupt_after(epoch))
    resumed = trainer(**arguments).train(HOPELESS, checkpoint=checkpoint)
    assert resumed.resumed_from == epoch and not resumed.notes
    assert as_bytes(resumed) == as_bytes(whole)
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    assert [path.name for path in checkpoint.path.parent.iterdir()] == ["training.safetensors"]


def test_a_stop_request_ends_the_training_and_keeps_the_last_whole_epoch(tmp_path: Path) -> None:
    checkpoint = FileCheckpoint(tmp_path / "c")
    epochs: list[int] = []
    with pytest.raises(TrainingStopped) as caught:
        trainer().train(
            DATA, checkpoint=checkpoint, on_epoch=lambda r: epochs.append(r.epoch), should_stop=lambda: len(epochs) == 2
        )
    assert caught.value.code == "stopped" and caught.value.epoch == 3
    resumed = trainer().train(DATA, checkpoint=checkpoint)
    assert resumed.resumed_from == 2
    assert as_bytes(resumed) == as_bytes(usual_result())


def test_a_finished_training_is_not_run_again_and_saving_the_model_clears_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = FileCheckpoint(tmp_path / "c")
    one = trainer()
    result = one.train(DATA, checkpoint=checkpoint)
    again = one.train(DATA, checkpoint=checkpoint, on_epoch=interrupt_after(1))
    assert again.resumed_from == again.epochs == result.epochs and as_bytes(again) == as_bytes(result)

    def failing(*_: Any) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        one.save_model(again, failing, checkpoint=checkpoint)
    assert checkpoint.load() is not None
    spec, weights, metrics = one.save_model(again, lambda *all_of_it: all_of_it, checkpoint=checkpoint)
    assert checkpoint.load() is None
    assert spec == result.spec and weights is again.weights
    assert metrics["loss"] == result.best.validation_loss and metrics["epochs"] == result.epochs
    assert set(metrics["validation"]) == {"content", "difficulty", "path"} and len(metrics["history"]) == result.epochs


@pytest.mark.parametrize(
    ("changes", "data"),
    [
        ({"seed": 8}, DATA),
        ({"epochs": 5}, DATA),
        ({}, TrainingData(replace(DATA.training, score=1 - DATA.training.score), DATA.validation)),
        ({}, TrainingData(DATA.training, DATA.training)),
    ],
)
def test_a_checkpoint_of_another_training_is_ignored_and_says_so(
    tmp_path: Path, changes: dict[str, Any], data: TrainingData
) -> None:
    checkpoint = FileCheckpoint(tmp_path / "c")
    with pytest.raises(Interrupted):
        trainer().train(DATA, checkpoint=checkpoint, on_epoch=interrupt_after(1))
    result = trainer(**changes).train(data, checkpoint=checkpoint)
    assert result.resumed_from == 0 and "ignored" in result.notes[0]
    assert [record.epoch for record in result.history] == list(range(1, result.epochs + 1))


def test_a_damaged_checkpoint_is_ignored_and_says_so(tmp_path: Path) -> None:
    checkpoint = FileCheckpoint(tmp_path / "c")
    with pytest.raises(Interrupted):
        trainer().train(DATA, checkpoint=checkpoint, on_epoch=interrupt_after(1))
    good = checkpoint.load()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    for bad in (good[: len(good) // 2], bytes(flipped), b"", b"nothing of the kind"):
        with pytest.raises(CheckpointError):
            decode_state(bad)
    checkpoint.save(bytes(flipped))
    result = trainer().train(DATA, checkpoint=checkpoint)
    assert result.resumed_from == 0 and "damaged" in result.notes[0]


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    checkpoint = FileCheckpoint(tmp_path / "c")
    trainer(epochs=1).train(DATA, checkpoint=checkpoint)
    state = decode_state(checkpoint.load())
    assert encode_state(state, fingerprint="x") == encode_state(
        decode_state(encode_state(state, fingerprint="x")), fingerprint="x"
    )
    assert state.progress.finished and len(state.dropout) == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 1}, "batch_size"),
        ({"loss_weights": (1.0, -1.0, 1.0)}, "loss_weights"),
        ({"loss_weights": (0.0, 0.0, 0.0)}, "loss_weights"),
        ({"patience": 0}, "patience"),
        ({"plateau_factor": 1.0}, "plateau_factor"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(TrainingError, match=field) as caught:
        trainer(**changes)
    assert caught.value.code == "bad_config"


def test_a_network_that_cannot_be_declared_is_refused() -> None:
    with pytest.raises(NetworkError, match="hidden_layers"):
        trainer(hidden_layers=())
    with pytest.raises(NetworkError, match="shared_dense_9"):
        trainer(freeze_layers=("shared_dense_9",))


@pytest.mark.parametrize("name", ["training", "validation"])
@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        (lambda s: s.take(slice(0, 0)), "no_samples", "samples"),
        (lambda s: replace(s, second=s.second[:, :3]), "wrong_shape", "second"),
        (lambda s: replace(s, first=s.first * np.float32(np.nan)), "not_finite", "first"),
        (lambda s: replace(s, content=s.content + 128), "bad_labels", "content"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_by_name(name: str, change: Any, code: str, field: str) -> None:
    with pytest.raises(TrainingError, match=f"{name}: {field}") as caught:
        trainer().train(replace(DATA, **{name: change(getattr(DATA, name))}))
    assert caught.value.code == code


def test_a_training_that_diverges_says_so() -> None:
    with pytest.raises(TrainingError, match="learning_rate") as caught:
        trainer(learning_rate=1e35).train(DATA)
    assert caught.value.code == "diverged"


def test_the_default_trainer_is_the_originals_network_and_accepts_100_epochs() -> None:
    assert MainModelTrainer(256, (512, 256, 128, 64), 1e-3, 100).spec == NetworkSpec()
    assert MainModelTrainer().build_model().count_params() == 318_954
