"""Figures against reference values, mixtures, paired changes that fail closed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aivo_core.samples import Samples
from models_store.bootstrap import bootstrap_interval, paired_change
from models_store.evaluation import (
    MIX_WEIGHTS,
    Evaluated,
    EvaluationError,
    Forecast,
    LearnerLosses,
    choose_mix,
    learner_losses,
    main_metrics,
    mix_content,
)
from models_store.metrics import (
    binary_losses,
    brier,
    calibration,
    class_losses,
    log_loss,
    roc_auc,
    top_k,
)
from models_store.success_tables import level_distance, target_success
from tests.shared import SHARED, needs_vectors


def softmax(values: np.ndarray) -> np.ndarray:
    exp = np.exp(values)
    return (exp / exp.sum(axis=1, keepdims=True)).astype(np.float32)


def make_samples(seed: int, n: int, *, events: int | None = None) -> Samples:
    rng = np.random.default_rng(seed)
    return Samples(
        first=np.zeros((n, 256), dtype=np.float32),
        second=np.zeros((n, 256), dtype=np.float32),
        content=rng.integers(0, 20, n),
        path=rng.integers(0, 24, n),
        level=rng.uniform(0.5, 9.5, n).astype(np.float32),
        score=(rng.random(n) < 0.5).astype(np.float32),
        position=np.arange(1, n + 1),
        content_prior=softmax(rng.normal(size=(n, 128))),
        events=n + 1 if events is None else events,
    )


def make_forecast(seed: int, n: int) -> Forecast:
    rng = np.random.default_rng(seed)
    return Forecast(*(softmax(rng.normal(size=(n, units))) for units in (128, 32, 10, 10)))


@needs_vectors
def test_figures_equal_the_reference_values() -> None:
    reference = json.loads((SHARED / "vectors" / "metrics.json").read_text())
    checked = 0
    for case in reference["cases"]:
        expected = case["expected"]
        if case["kind"] == "classification":
            probabilities, label = np.array(case["proba"]), np.array(case["y_true"])
            assert top_k(probabilities, label, 1) == pytest.approx(expected["accuracy_top1"], rel=1e-9)
            assert log_loss(probabilities, label) == pytest.approx(expected["log_loss"], rel=1e-9)
            if expected["accuracy_top5"] is not None:
                assert top_k(probabilities, label, 5) == pytest.approx(expected["accuracy_top5"], rel=1e-9)
            checked += 1
        elif case["kind"] == "binary":
            score, label = np.array(case["score"]), np.array(case["y_true"], dtype=float)
            assert roc_auc(score, label) == pytest.approx(expected["roc_auc"], rel=1e-9)
            assert brier(score, label) == pytest.approx(expected["brier"], rel=1e-9)
            assert binary_losses(score, label).mean() == pytest.approx(expected["log_loss"], rel=1e-9)
            checked += 1
    assert checked >= 9


def test_the_auc_counts_ties_one_half_and_is_null_with_one_class() -> None:
    assert roc_auc(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == 0.5
    assert roc_auc(np.array([0.1, 0.5, 0.5, 0.9]), np.array([0.0, 0.0, 1.0, 1.0])) == 0.875
    assert roc_auc(np.array([0.1, 0.9]), np.array([1.0, 1.0])) is None


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.sampled_from([0.0, 0.25, 1.0])), min_size=2, max_size=12))
def test_the_auc_equals_a_loop_over_pairs(rows: list[tuple[float, float]]) -> None:
    p, s = np.array(rows).T
    right = [(a, w) for a, w in rows if w > 0]
    wrong = [(a, 1 - w) for a, w in rows if w < 1]
    total = sum(w * v for _, w in right for _, v in wrong)
    auc = roc_auc(p, s)
    if total == 0:
        assert auc is None
    else:
        won = sum(w * v * (1.0 if a > b else 0.5 if a == b else 0.0) for a, w in right for b, v in wrong)
        assert auc == pytest.approx(won / total)


def test_calibration_is_zero_for_honest_and_the_shift_for_shifted_forecasts() -> None:
    p = np.repeat(np.arange(1, 11) / 20, 20)
    s = np.concatenate([np.r_[np.ones(k), np.zeros(20 - k)] for k in range(1, 11)])
    assert calibration(p, s) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert calibration(p + 0.1, s) == pytest.approx((0.1, 0.1))
    shifted = p + np.where(p > 0.49, 0.3, 0.0)
    assert calibration(shifted, s) == pytest.approx((0.03, 0.3))
    assert calibration(np.array([0.2, 0.9]), np.array([0.0, 1.0])) == pytest.approx((0.15, 0.2))


@pytest.mark.parametrize(
    ("probabilities", "label", "code"),
    [
        (np.zeros((0, 3)), np.zeros(0, dtype=int), "no_samples"),
        (np.ones((2, 3)), np.zeros(3, dtype=int), "wrong_shape"),
        (np.full((1, 3), np.nan), np.zeros(1, dtype=int), "not_finite"),
        (np.ones((1, 3)), np.array([3]), "bad_range"),
        (np.ones((1, 3)), np.array([-1]), "bad_range"),
    ],
)
def test_class_figures_refuse_what_cannot_be_measured(probabilities: Any, label: Any, code: str) -> None:
    for act in (lambda: top_k(probabilities, label, 1), lambda: class_losses(probabilities, label)):
        with pytest.raises(EvaluationError) as error:
            act()
        assert error.value.code == code


@pytest.mark.parametrize(
    ("probability", "score", "code"),
    [
        (np.zeros(0), np.zeros(0), "no_samples"),
        (np.zeros(2), np.zeros(3), "wrong_shape"),
        (np.array([np.nan]), np.array([1.0]), "not_finite"),
        (np.array([0.5]), np.array([1.5]), "bad_range"),
        (np.array([1.5]), np.array([1.0]), "bad_range"),
    ],
)
def test_success_figures_refuse_what_cannot_be_measured(probability: Any, score: Any, code: str) -> None:
    for function in (roc_auc, brier, calibration, binary_losses):
        with pytest.raises(EvaluationError) as error:
            function(probability, score)
        assert error.value.code == code


def test_a_mixture_follows_its_formula_and_is_a_distribution() -> None:
    network, prior = make_forecast(1, 4).content, make_forecast(2, 4).content
    mixed = mix_content(network, prior, 0.15)
    raw = (network.astype(float) + 1e-6) ** 0.85 * (prior.astype(float) + 1e-6) ** 0.15
    np.testing.assert_allclose(mixed, raw / raw.sum(axis=1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(mixed.sum(axis=1), 1.0, rtol=1e-5)
    assert mixed.dtype == np.float32
    assert mix_content(network, prior, 0.0) is network
    np.testing.assert_allclose(mix_content(network[0], prior[0], 0.15), mixed[0], rtol=1e-6)
    with pytest.raises(EvaluationError):
        mix_content(network, prior, 1.5)
    with pytest.raises(EvaluationError):
        mix_content(network, prior[:2], 0.5)


def test_the_mixture_is_chosen_by_log_loss_and_stays_with_the_network_where_the_prior_hurts() -> None:
    samples = make_samples(3, 300)
    row = np.arange(300)
    good, bad = np.full((300, 128), 0.1), np.full((300, 128), 0.1)
    good[row, samples.content] = 30.0
    bad[row, (samples.content + 1) % 128] = 30.0
    good, bad = ((values / values.sum(axis=1, keepdims=True)).astype(np.float32) for values in (good, bad))
    base = make_forecast(4, 300)

    def chosen(network: np.ndarray, prior: np.ndarray) -> float:
        return choose_mix([replace(base, content=network)], [replace(samples, content_prior=prior)])

    assert chosen(good, bad) == 0.0
    assert chosen(bad, good) == 0.4
    assert chosen(good, good) == 0.0
    assert MIX_WEIGHTS == (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
    best = min(MIX_WEIGHTS, key=lambda w: log_loss(mix_content(base.content, samples.content_prior, w), samples.content))
    assert choose_mix([base.take(slice(0, 100)), base.take(slice(100, 300))], list(halves(samples, 100))) == best


def halves(samples: Samples, at: int) -> tuple[Samples, Samples]:
    return samples.take(slice(0, at)), samples.take(slice(at, len(samples)))


def test_choosing_a_mixture_needs_samples_of_every_forecast() -> None:
    with pytest.raises(EvaluationError) as error:
        choose_mix([], [])
    assert error.value.code == "no_samples"
    with pytest.raises(EvaluationError):
        choose_mix([make_forecast(1, 3)], [])


def test_the_losses_of_a_learner_add_up_by_hand() -> None:
    samples, forecast = make_samples(5, 7), make_forecast(6, 7)
    losses = learner_losses("a", forecast, samples, 0.2)
    row = np.arange(7)
    mixed = mix_content(forecast.content, samples.content_prior, 0.2).astype(float)
    assert losses.content == pytest.approx(-np.log(mixed[row, samples.content]).mean(), rel=1e-6)
    assert losses.path == pytest.approx(-np.log(forecast.path[row, samples.path]).mean(), rel=1e-6)
    by_hand = []
    for p, x, s in zip(forecast.difficulty_second.astype(float), samples.level.astype(float), samples.score, strict=True):
        low = int(x)
        curve = [p[k:].sum() for k in range(11)]
        g = (1 - (x - low)) * curve[low] + (x - low) * curve[low + 1]
        by_hand.append(-np.log(g if s else 1 - g))
    assert losses.score == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert losses.total == losses.content + losses.path + losses.score
    assert losses.samples == 7
    assert dict(losses.heads()) == {
        "content": losses.content,
        "path": losses.path,
        "score": losses.score,
        "total": losses.total,
    }


def test_the_losses_of_a_learner_fail_closed() -> None:
    samples, forecast = make_samples(5, 7), make_forecast(6, 7)
    broken = forecast.difficulty_second.copy()
    broken[3, 2] = np.nan
    for bad, own, code in (
        (forecast, samples.take(slice(0, 0)), "no_samples"),
        (forecast, samples.take(slice(0, 6)), "wrong_shape"),
        (replace(forecast, difficulty_second=broken), samples, "not_finite"),
        (replace(forecast, content=forecast.content * np.float32(np.nan)), samples, "not_finite"),
        (replace(forecast, path=forecast.path * np.float32(np.inf)), samples, "not_finite"),
    ):
        with pytest.raises(EvaluationError) as error:
            learner_losses("a", bad, own, 0.1)
        assert error.value.code == code


def losses_of(values: list[float], *, samples: int = 10, shift: float = 0.0) -> list[LearnerLosses]:
    return [LearnerLosses(f"l{n:03d}", samples, 1.0, 1.0, value + shift, 0.5, 0.9, 0.5, 0.6) for n, value in enumerate(values)]


def test_a_paired_change_counts_learners_and_contains_its_mean() -> None:
    rng = np.random.default_rng(8)
    base = rng.uniform(0.4, 0.7, 60).tolist()
    noise = rng.normal(-0.01, 0.01, 60)
    noise[:6] = 0.0
    changes = paired_change(losses_of(base), losses_of([b + d for b, d in zip(base, noise, strict=True)]))
    assert set(changes) == {"content", "path", "score", "total"}
    score = changes["score"]
    assert score.mean == pytest.approx(noise.mean())
    assert score.interval[0] < score.mean < score.interval[1] < 0
    half_width = (score.interval[1] - score.interval[0]) / 2
    assert half_width == pytest.approx(1.96 * noise.std() / np.sqrt(60), rel=0.15)
    assert score.better == pytest.approx(np.mean(noise < 0))
    assert score.same == pytest.approx(0.1)
    assert score.better + score.same + score.worse == pytest.approx(1.0)
    assert score.worst == pytest.approx(noise.max())
    assert score.learners == 60
    assert score.relative_fall == pytest.approx(-noise.mean() / np.mean(base))
    assert changes["content"].mean == 0.0
    assert changes["content"].same == 1.0
    assert changes["total"].mean == pytest.approx(noise.mean())
    assert json.loads(json.dumps(score.to_json()))["interval"] == list(score.interval)


def test_a_paired_change_does_not_depend_on_the_order_of_learners_and_repeats_with_its_seed() -> None:
    rng = np.random.default_rng(9)
    one, two = losses_of(rng.random(30).tolist()), losses_of(rng.random(30).tolist())
    assert paired_change(one, two) == paired_change(one[::-1], two[10:] + two[:10])
    assert paired_change(one, two, seed=1) == paired_change(one, two, seed=1)
    assert paired_change(one, two, seed=1)["score"].interval != paired_change(one, two, seed=2)["score"].interval


def test_swapping_the_models_turns_every_sign() -> None:
    rng = np.random.default_rng(10)
    one, two = losses_of(rng.random(30).tolist()), losses_of(rng.random(30).tolist())
    there, back = paired_change(one, two)["score"], paired_change(two, one)["score"]
    assert back.mean == pytest.approx(-there.mean)
    assert (back.better, back.worse) == (there.worse, there.better)
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]), abs=1e-12)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(0.3, 1.0, (40, 1)), draws=300, seed=trial)[0]
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


BASE = losses_of([0.5, 0.6, 0.7])
REFUSED: dict[str, tuple[list[LearnerLosses], list[LearnerLosses], str]] = {
    "nothing": ([], [], "no_learners"),
    "no candidate": (BASE, [], "no_learners"),
    "a learner less": (BASE, BASE[:2], "different_learners"),
    "another learner": (BASE, [*BASE[:2], replace(BASE[2], key="x")], "different_learners"),
    "a learner twice": (BASE, [*BASE, BASE[0]], "duplicate_learner"),
    "other samples": (BASE, [*BASE[:2], replace(BASE[2], samples=9)], "different_learners"),
    "no samples": ([replace(b, samples=0) for b in BASE], [replace(b, samples=0) for b in BASE], "no_samples"),
    "NaN": (BASE, [*BASE[:2], replace(BASE[2], path=float("nan"))], "not_finite"),
    "infinite current": ([*BASE[:2], replace(BASE[2], content=float("inf"))], BASE, "not_finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_paired_change_fails_closed(case: str) -> None:
    current, candidate, code = REFUSED[case]
    with pytest.raises(EvaluationError) as error:
        paired_change(current, candidate)
    assert error.value.code == code


def evaluated(count: int, n: int, *, seed: int = 20) -> list[Evaluated]:
    return [
        Evaluated(
            key=f"l{index}",
            samples=make_samples(seed + index, n),
            forecast=make_forecast(seed + 100 + index, n),
            expected_level=np.full(n, 5.0),
            item_mean=np.full(n, 0.4),
        )
        for index in range(count)
    ]


def test_main_metrics_have_the_contracts_keys_and_look_at_the_later_part_only() -> None:
    learners = evaluated(4, 39)
    result = main_metrics(learners, mix=0.1, draws=50)
    json.dumps(result, allow_nan=False)
    metrics = result["metrics"]
    assert {"content", "difficulty", "path"} <= set(metrics)
    assert set(metrics["content"]) == {"top1", "top5", "log_loss"}
    assert set(metrics["difficulty"]) == {"auc", "log_loss", "brier", "calibration_gap", "worst_bin"}
    assert set(metrics["path"]) == {"top1", "log_loss"}
    # 40 events: positions 28..39 are the later 30 %.
    assert result["evaluated_on"] == {"learners": 4, "samples": 48}
    spoilt = [replace(x, forecast=_uniform_before(x.forecast, 27)) for x in learners]
    assert main_metrics(spoilt, mix=0.1, draws=50)["metrics"] == metrics
    label = np.concatenate([x.samples.content[27:] for x in learners])
    content = np.concatenate([x.forecast.content[27:] for x in learners])
    assert metrics["content"]["log_loss"] == pytest.approx(log_loss(content, label))


def _uniform_before(forecast: Forecast, row: int) -> Forecast:
    changed = [getattr(forecast, name).copy() for name in ("content", "path", "difficulty_first", "difficulty_second")]
    for values in changed:
        values[:row] = 1.0 / values.shape[1]
    return Forecast(*changed)


def test_the_history_table_covers_every_sample_once_and_empty_bins_are_null() -> None:
    result = main_metrics(evaluated(3, 39), mix=0.0, draws=50)
    table = result["by_history"]
    assert list(table) == ["1-4", "5-9", "10-19", "20-29", "30-99", "100-199", "200+"]
    assert [table[name]["samples"] for name in table] == [12, 15, 30, 30, 30, 0, 0]
    assert table["200+"]["content"] == {"top1": None, "log_loss": None}
    assert table["200+"]["item_mean"] == {"auc": None, "log_loss": None}
    assert table["1-4"]["item_mean"]["auc"] == 0.5


def test_main_metrics_fail_closed() -> None:
    learners = evaluated(2, 10)
    for bad, code in (
        ([], "no_learners"),
        ([replace(learners[0], samples=learners[0].samples.take(slice(0, 2)))], "wrong_shape"),
        ([replace(learners[0], item_mean=np.zeros(3))], "wrong_shape"),
        ([replace(learners[0], samples=replace(learners[0].samples, events=1000))], "no_samples"),
    ):
        with pytest.raises(EvaluationError) as error:
            main_metrics(bad, mix=0.0)
        assert error.value.code == code


def learners_with_true_curve(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attained levels drawn from the very distribution that is forecast."""
    rng = np.random.default_rng(30)
    p = softmax(rng.normal(size=(n, 10)) * 1.5).astype(float)
    p /= p.sum(axis=1, keepdims=True)
    level = rng.integers(1, 10, n).astype(float)
    attained = (p.cumsum(axis=1) < rng.random(n)[:, None]).sum(axis=1)
    return p, level, (attained >= level).astype(float)


def test_recommended_levels_hit_their_target_when_the_curve_is_true() -> None:
    p, level, score = learners_with_true_curve(60_000)
    for row in target_success(p, level, score):
        assert row["samples"] > 3000
        assert row["observed"] == pytest.approx(row["predicted"], abs=0.025)
        assert abs(row["error"]) < 0.05
        assert 0.5 < row["reachable"] <= 1.0
    inverted = target_success(p, level, 1.0 - score)
    assert abs(inverted[-1]["error"]) > 0.3


def test_level_distance_shows_a_curve_that_is_wrong_off_the_path() -> None:
    p, level, score = learners_with_true_curve(30_000)
    table = level_distance(p, level, score, np.full(30_000, 5.0))
    assert table is not None
    assert sum(row["samples"] for row in table) == 30_000
    assert max(abs(row["gap"]) for row in table if row["samples"] > 500) < 0.03
    flat = np.full_like(p, 0.1)
    wrong = level_distance(flat, level, np.full(30_000, score.mean()), np.full(30_000, 5.0))
    assert wrong is not None
    assert max(abs(row["gap"]) for row in wrong if row["samples"] > 500) > 0.2
    assert level_distance(p, level, score, None) is None
