"""Policies: one frozen value per run, checked whole before anything happens."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from aivo_site.errors import UsageError
from federation.engines import EngineUnavailable, available_engines, check_engine, get_engine
from federation.models import FederationPolicy
from federation.policies import PolicyError, RoundPolicy, check_row, default_policy
from learners.models import Organisation


def test_the_defaults_are_those_of_the_row() -> None:
    assert RoundPolicy() == RoundPolicy.from_row(FederationPolicy())


def test_the_default_policy_can_be_run() -> None:
    RoundPolicy().validate()


def test_every_field_of_the_row_but_its_name_and_owner_is_in_the_policy() -> None:
    own = {"id", "created_at", "updated_at", "organisation", "name", "participates"}
    of_the_row = {f.name for f in FederationPolicy._meta.get_fields() if not f.auto_created} - own
    assert {f.name for f in fields(RoundPolicy)} == of_the_row


@pytest.mark.django_db
def test_there_is_one_default_policy_however_often_it_is_asked_for() -> None:
    first = default_policy()
    assert default_policy() == first
    assert FederationPolicy.objects.count() == 1


def test_json_gives_the_same_policy_back() -> None:
    policy = RoundPolicy(strategy="weighted", strategy_parameters={"weight_cap": 0.2}, guarded_metrics={"total": 0.0})
    assert RoundPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


def test_a_policy_kept_before_a_field_existed_takes_that_fields_default() -> None:
    kept = RoundPolicy(minimum_learners=9).to_json()
    del kept["gate_draws"]
    assert RoundPolicy.from_json(kept) == RoundPolicy(minimum_learners=9)


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(PolicyError, match="minimum_learner") as caught:
        RoundPolicy.from_row(FederationPolicy(), minimum_learner=3)
    assert caught.value.code == "unknown_field"


def test_overrides_replace_the_rows_values() -> None:
    policy = RoundPolicy.from_row(
        FederationPolicy(),
        strategy="fedavg",
        minimum_learners=2,
        max_stale_days=30,
        server_learning_rate=0.5,
        contribution_source="sessions",
    )
    policy.validate()
    assert (policy.strategy, policy.minimum_learners, policy.server_learning_rate) == ("fedavg", 2, 0.5)


@pytest.mark.parametrize(("strategy", "mu"), [("fedavg", 0.0), ("fedprox", 1.0), ("weighted", 1.0)])
def test_only_fedavg_trains_contributions_without_a_proximal_term(strategy: str, mu: float) -> None:
    config = RoundPolicy(strategy=strategy).contribution_config()
    assert (config.proximal_mu, config.adaptation) == (mu, "tail")


def test_personal_training_has_its_own_proximal_term_unless_its_sessions_are_contributed() -> None:
    assert RoundPolicy().personal_config().proximal_mu == 10.0
    assert RoundPolicy(contribution_source="sessions").personal_config().proximal_mu == 1.0
    assert RoundPolicy(contribution_source="sessions", strategy="fedavg").personal_config().proximal_mu == 0.0


PRIVATE = {"differential_privacy": True, "clip_norm": 1.0, "noise_multiplier": 1.0}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"strategy": "fedsum"}, "unknown_strategy", "fedavg, fedprox, weighted"),
    ({"strategy_parameters": {"beta": 0.1}}, "unknown_parameter", "beta"),
    ({"strategy": "weighted", "strategy_parameters": {"weight_cap": 2}}, "bad_parameter", "weight_cap"),
    ({"strategy": "trimmed_mean", "strategy_parameters": {"beta": 0.5}}, "bad_parameter", "from 0.0 to 0.49"),
    ({"strategy": "krum"}, "unknown_strategy", "median, trimmed_mean"),
    *(
        ({"strategy": name, "differential_privacy": True}, "strategy_not_private", "fedavg, fedprox with differential_privacy")
        for name in ("weighted", "median", "trimmed_mean")
    ),
    ({"contribution_source": "uploads"}, "bad_policy", "round, sessions"),
    ({"adaptation": "head"}, "bad_policy", "tail, difficulty_bias, tail_then_bias"),
    ({"contribution_source": "sessions", "adaptation": "difficulty_bias"}, "sessions_need_tail", "tail, tail_then_bias"),
    ({"minimum_learners": 0}, "bad_policy", "minimum_learners must be a whole number of at least 1"),
    ({"minimum_learners": True}, "bad_policy", "minimum_learners"),
    ({"minimum_learners": 10**12}, "bad_policy", "minimum_learners"),
    ({"max_stale_days": -1}, "bad_policy", "max_stale_days"),
    ({"local_epochs": 2.5}, "bad_policy", "local_epochs"),
    ({"server_learning_rate": 0.0}, "bad_policy", "server_learning_rate must be a number that is positive"),
    ({"server_learning_rate": float("nan")}, "bad_policy", "server_learning_rate"),
    ({"learning_rate": -1e-3}, "bad_policy", "learning_rate"),
    ({"learning_rate": "fast"}, "bad_policy", "learning_rate"),
    ({"bias_learning_rate": float("inf")}, "bad_policy", "bias_learning_rate"),
    ({"proximal_mu": -1.0}, "bad_policy", "proximal_mu must be a number that is 0 or more"),
    ({"norm_outlier_factor": 0.5}, "bad_policy", "norm_outlier_factor"),
    ({"canary_share": 1.5}, "bad_policy", "canary_share"),
    ({"canary_share": 0.1}, "not_available", "canary_share"),
    ({"server_optimiser": "adam"}, "not_available", "server_optimiser"),
    ({"guarded_metrics": {"accuracy": 0.1}}, "bad_policy", "total, content, path, score"),
    ({"guarded_metrics": {"total": -0.1}}, "bad_policy", "guarded_metrics.total"),
    ({"max_samples": 20, "min_samples": 50}, "bad_policy", "max_samples"),
    ({"target_epsilon": 8.0}, "needs_privacy", "target_epsilon"),
    ({"noise_multiplier": 0.1}, "needs_privacy", "noise_multiplier"),
    ({"noise_multiplier": 0.0}, "needs_privacy", "noise_multiplier"),
    ({"clip_norm": 1.0}, "needs_privacy", "clip_norm"),
    ({"sampling": "poisson"}, "needs_privacy", "sampling"),
    ({"sample_level_privacy": True}, "privacy_not_available", "sample_level_privacy"),
    ({"upload_privacy": True}, "privacy_not_available", "upload_privacy"),
    ({"epsilon_cap": 0.0}, "privacy_incomplete", "epsilon_cap must be a positive number"),
    ({"epsilon_cap_learner": float("nan")}, "privacy_incomplete", "epsilon_cap_learner"),
    ({"differential_privacy": True}, "privacy_incomplete", "clip_norm"),
    ({"differential_privacy": True, "clip_norm": 1.0}, "privacy_incomplete", "target_epsilon or noise_multiplier"),
    ({**PRIVATE, "target_epsilon": 8.0}, "privacy_incomplete", "not both"),
    ({**PRIVATE, "clip_norm": 0.0}, "privacy_incomplete", "clip_norm must be a positive number"),
    ({**PRIVATE, "clip_norm": float("inf")}, "privacy_incomplete", "clip_norm"),
    ({**PRIVATE, "noise_multiplier": 0.0}, "privacy_incomplete", "without noise epsilon is infinite"),
    ({**PRIVATE, "noise_multiplier": -1.0}, "privacy_incomplete", "noise_multiplier"),
    ({**PRIVATE, "noise_multiplier": float("nan")}, "privacy_incomplete", "noise_multiplier"),
    ({**PRIVATE, "noise_multiplier": 0.1}, "epsilon_too_large", "epsilon_override_reason"),
    ({**PRIVATE, "noise_multiplier": None, "target_epsilon": 51.0}, "epsilon_too_large", "target_epsilon"),
    ({**PRIVATE, "noise_multiplier": None, "target_epsilon": -1.0}, "privacy_incomplete", "target_epsilon"),
    ({**PRIVATE, "sampling": "fixed_size"}, "privacy_not_available", "none, poisson"),
    ({**PRIVATE, "adaptive_clipping": True}, "privacy_not_available", "adaptive_clipping"),
    ({**PRIVATE, "sampling": "poisson", "contribution_source": "sessions"}, "not_private", "contribution_source must be round"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "code", "text"), REFUSED, ids=[f"{values}" for values, _, _ in REFUSED])
def test_what_cannot_be_run_is_refused_by_field_and_allowed_values(values: dict[str, Any], code: str, text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        replace(RoundPolicy(), **values).validate()
    assert caught.value.code == code
    assert text in str(caught.value)
    assert isinstance(caught.value, UsageError)


def test_settings_of_privacy_that_go_together_are_accepted() -> None:
    for values in (
        PRIVATE,
        {**PRIVATE, "sampling": "poisson"},
        {**PRIVATE, "contribution_source": "sessions", "strategy": "fedavg"},
        {**PRIVATE, "noise_multiplier": None, "target_epsilon": 8.0, "epsilon_cap": 8.0, "epsilon_cap_learner": 4.0},
        {**PRIVATE, "noise_multiplier": 0.1, "epsilon_override_reason": "a trial without children"},
    ):
        replace(RoundPolicy(), **values).validate()


@pytest.mark.django_db
def test_an_organisations_policy_may_leave_its_learners_out_and_nothing_more() -> None:
    school = Organisation.objects.create(slug="school", name="School")
    check_row(FederationPolicy(organisation=school, name="school", participates=False))
    with pytest.raises(PolicyError, match="learning_rate") as caught:
        check_row(FederationPolicy(organisation=school, name="school", learning_rate=1.0))
    assert caught.value.code == "only_restrictions"


@pytest.mark.django_db
def test_an_organisation_cannot_raise_the_installations_cap() -> None:
    school = Organisation.objects.create(slug="school", name="School")
    FederationPolicy.objects.filter(pk=default_policy().pk).update(epsilon_cap=8.0)
    check_row(FederationPolicy(organisation=school, name="school", epsilon_cap=4.0))
    with pytest.raises(PolicyError, match="epsilon_cap"):
        check_row(FederationPolicy(organisation=school, name="school", epsilon_cap=9.0))


def test_an_engine_that_is_not_here_is_refused_with_the_names_of_those_that_are() -> None:
    assert available_engines() == ("keras", "cohort")
    for refused in ("torch", "../keras"):
        with pytest.raises(EngineUnavailable, match="keras") as caught:
            get_engine(refused)
        assert caught.value.code == "engine_unavailable"
        with pytest.raises(EngineUnavailable):
            check_engine(refused)
