"""The gate's decision, on losses made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.rounds.gate import GROUP_MINIMUM, GateDecision, GateRules, decide
from models_store.evaluation import LearnerLosses

RULES = GateRules(tolerances={}, minimum_learners=10, draws=400)


def losses(changes: np.ndarray | None = None, *, n: int = 20, **heads: float) -> list[LearnerLosses]:
    """n learners; ``changes`` (n,) is added to content, ``heads`` to a head of everyone."""
    added = np.zeros(n) if changes is None else changes
    return [
        LearnerLosses(
            key=f"k{i}",
            samples=10,
            content=1.0 + float(added[i]) + heads.get("content", 0.0),
            path=1.0 + heads.get("path", 0.0),
            score=0.5 + heads.get("score", 0.0),
            content_top1=0.5,
            content_top5=0.8,
            path_top1=0.5,
            score_first=0.5,
        )
        for i in range(len(added))
    ]


def judge(candidate: list[LearnerLosses], rules: GateRules = RULES, **groups: dict[str, list[str]]) -> GateDecision:
    return decide(losses(n=len(candidate)), candidate, rules=rules, groups=groups)


def test_a_candidate_that_is_better_for_all_passes_with_its_relative_fall() -> None:
    decision = judge(losses(content=-0.1))
    assert decision.passed
    assert decision.improvement == pytest.approx(0.1 / 2.5)
    assert decision.report["changes"]["total"]["mean"] == pytest.approx(-0.1)
    assert decision.report["metrics"]["current"]["total"] == pytest.approx(2.5)


def test_a_candidate_that_is_the_same_does_not_pass() -> None:
    assert judge(losses()).code == "gate_not_better"


def test_a_candidate_whose_interval_reaches_zero_does_not_pass() -> None:
    noisy = np.random.default_rng(3).normal(-0.01, 0.5, 20)
    noisy += -0.01 - noisy.mean()
    decision = judge(losses(noisy))
    assert decision.code == "gate_not_better"
    assert decision.report["changes"]["total"]["interval"][1] > 0


def test_one_head_beyond_its_tolerance_stops_a_candidate_that_is_better_in_total() -> None:
    assert judge(losses(content=-0.1, score=0.0019)).passed
    decision = judge(losses(content=-0.1, score=0.0021))
    assert decision.code == "gate_worse" and "score" in decision.reason


def test_the_policys_tolerances_replace_the_products() -> None:
    lenient = replace(RULES, tolerances={"total": 0.0, "score": 0.05})
    assert judge(losses(content=-0.1, score=0.04), lenient).passed
    strict = replace(RULES, tolerances={"content": 0.0})
    assert judge(losses(path=-0.5, content=0.01), strict).code == "gate_worse"


def test_a_gain_below_the_minimum_does_not_pass() -> None:
    assert judge(losses(content=-0.01), replace(RULES, minimum_gain=0.02)).code == "gate_not_better"


def test_too_few_learners_are_no_evidence() -> None:
    assert judge(losses(n=9, content=-0.5)).code == "gate_no_evidence"
    assert decide([], [], rules=RULES, groups={}).code == "gate_no_evidence"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_fails_closed(value: float) -> None:
    candidate = losses(content=-0.5)
    candidate[3] = replace(candidate[3], path=value)
    decision = judge(candidate)
    assert decision.code == "gate_no_evidence" and not decision.passed
    assert decision.improvement is None


def test_other_learners_than_the_current_ones_fail_closed() -> None:
    candidate = losses(content=-0.5)
    candidate[0] = replace(candidate[0], key="somebody else")
    assert judge(candidate).code == "gate_no_evidence"


def test_groups_are_shown_from_ten_learners_on_with_what_they_could_have_shown() -> None:
    candidate = losses(np.linspace(-0.2, 0.0, 30), n=30)
    keys = [loss.key for loss in candidate]
    decision = judge(candidate, need={"dyslexia": keys[:GROUP_MINIMUM], "adhd": keys[: GROUP_MINIMUM - 1]})
    assert set(decision.report["groups"]["need"]) == {"dyslexia"}
    assert decision.report["groups_too_small"] == {"need": 1}
    group = decision.report["groups"]["need"]["dyslexia"]
    assert group["learners"] == GROUP_MINIMUM
    changes = np.linspace(-0.2, 0.0, 30)[:GROUP_MINIMUM]
    expected = (1.959964 + 0.841621) * changes.std(ddof=1) / math.sqrt(GROUP_MINIMUM)
    assert group["minimum_detectable_effect"]["total"] == pytest.approx(expected)


def test_the_order_of_the_learners_changes_nothing() -> None:
    changes = np.random.default_rng(5).normal(-0.05, 0.1, 20)
    forward = judge(losses(changes)).report
    backward = decide(losses()[::-1], losses(changes)[::-1], rules=RULES, groups={}).report
    assert forward["changes"] == backward["changes"] and forward["passed"] == backward["passed"]


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
def test_a_candidate_that_is_worse_on_average_never_passes(shift: float, seed: int) -> None:
    changes = np.random.default_rng(seed).normal(0.0, 0.3, 20)
    changes += shift + 1e-9 - changes.mean()
    assert not judge(losses(changes)).passed
