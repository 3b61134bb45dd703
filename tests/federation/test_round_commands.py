"""The doors of a shell and of cron: JSON, exit codes, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from aivo_site.jobs.models import Job, JobState
from federation.models import AggregationRound
from models_store.models import MainModelVersion
from models_store.versions import active_version
from tests.federation.rounds_world import ShrinkingEngine, make_world, set_policy
from tests.models_store.factories import make_version

ROUND_KEYS = (
    "round", "state", "reason", "base_version", "candidate_version", "eligible", "excluded", "accepted", "rejected",
    "metrics", "performance_improvement", "privacy", "seconds",
)  # fmt: skip
STATUS_KEYS = (
    "active_version", "main_versions", "learners", "active_learner_models", "sessions", "total_federated_updates",
    "average_performance", "rounds", "last_round", "privacy", "jobs",
)  # fmt: skip

pytestmark = pytest.mark.django_db(transaction=True)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the one JSON object on standard output, and standard error."""
    code = 0
    try:
        call_command(*arguments, "--json")
    except SystemExit as end:
        code = int(end.code or 0)
    except CommandError as error:
        return error.returncode, {}, str(error)
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def test_a_round_prints_one_object_with_every_key(engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world()
    code, result, _err = run(capsys, "run_federated_aggregation")
    assert code == 0 and set(ROUND_KEYS) <= set(result)
    assert (result["state"], result["round"], result["accepted"], result["eligible"]) == ("PROMOTED", 1, 6, 6)
    assert (result["base_version"], result["candidate_version"]) == (world.version.version, active_version().version)
    assert result["privacy"] is None and result["seconds"] > 0
    assert set(result["metrics"]) == {"current", "candidate"} and result["metrics"]["candidate"]["total"] > 0
    assert result["rebase"]["rebased"] == 6


def test_a_round_the_gate_refuses_exits_zero(engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.factor = 2.0
    make_world()
    code, result, _err = run(capsys, "run_federated_aggregation")
    assert (code, result["state"]) == (0, "REJECTED") and result["reason"] and result["rebase"] is None


def test_too_few_learners_exit_three_with_the_reason(engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    make_world(learners=3)
    code, result, err = run(capsys, "run_federated_aggregation", "--min-learners", "4")
    assert code == 3 and set(ROUND_KEYS) <= set(result)
    assert result["state"] == "SKIPPED" and result["eligible"] == 3
    assert result["error"]["code"] == "too_few_learners" and "at least 4" in err
    assert Job.objects.get().state == JobState.SKIPPED


def test_no_main_model_exits_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, result, err = run(capsys, "run_federated_aggregation")
    assert code == 1 and result["error"]["code"] == "no_main_model" and "train_main_model" in err
    assert AggregationRound.objects.count() == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--strategy", "best"), "fedavg, fedprox, weighted"),
        (("--server-lr", "0"), "server_learning_rate"),
        (("--server-lr", "-1"), "server_learning_rate"),
        (("--server-lr", "nan"), "server_learning_rate"),
        (("--min-learners", "0"), "minimum_learners"),
        (("--max-stale-days", "-3"), "max_stale_days"),
        (("--contribution", "all"), "round, sessions"),
        (("--promotion", "perhaps"), "automatic, manual"),
    ],
)
def test_a_wrong_flag_exits_two_naming_what_is_allowed(
    flags: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_world(learners=1)
    code, _result, err = run(capsys, "run_federated_aggregation", *flags)
    assert code == 2 and named in err
    assert AggregationRound.objects.count() == 0 and Job.objects.count() == 0


def test_a_policy_that_asks_for_privacy_is_refused_and_never_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    make_world()
    set_policy(differential_privacy=True)
    code, _result, err = run(capsys, "run_federated_aggregation")
    assert code == 2 and "privacy" in err.lower()
    assert AggregationRound.objects.count() == 0


def test_a_dry_run_says_who_and_why_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world(learners=3)
    world.learners[1].consent_contribution = False
    world.learners[1].save()
    code, result, _err = run(capsys, "run_federated_aggregation", "--dry-run")
    assert code == 0 and (result["eligible"], result["excluded"]) == (2, {"no_consent_contribution": 1})
    assert result["round"] is None and result["state"] is None
    reasons = {entry["learner_id"]: entry["reason"] for entry in result["learners"]}
    assert reasons == {"fed-0": None, "fed-1": "no_consent_contribution", "fed-2": None}
    assert AggregationRound.objects.count() == 0 and Job.objects.count() == 0


def test_a_dry_run_in_words_names_each_learner(capsys: pytest.CaptureFixture[str]) -> None:
    make_world(learners=2)
    call_command("run_federated_aggregation", "--dry-run")
    text = capsys.readouterr().out
    assert "2 learners can take part" in text and "fed-0: eligible" in text


def test_in_the_background_a_job_is_enqueued(capsys: pytest.CaptureFixture[str]) -> None:
    make_world()
    code, result, _err = run(capsys, "run_federated_aggregation", "--background", "--min-learners", "2")
    job = Job.objects.get(pk=result["job"])
    assert code == 0 and job.state == JobState.QUEUED
    assert job.params == {"overrides": {"minimum_learners": 2}, "dry_run": False, "rebase": True}


def test_without_rebase_the_models_stay(engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world()
    _code, result, _err = run(capsys, "run_federated_aggregation", "--no-rebase")
    assert result["rebase"] is None and world.model(0).source_version == world.version


def test_a_round_in_words_shows_before_and_after(engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    make_world()
    call_command("run_federated_aggregation")
    text = capsys.readouterr().out
    assert "PROMOTED" in text and "accepted 6" in text and "->" in text and "rebased 6" in text


def test_the_status_has_every_key_before_anything_exists(capsys: pytest.CaptureFixture[str]) -> None:
    code, result, _err = run(capsys, "federation_status")
    assert code == 0 and set(result) == set(STATUS_KEYS)
    assert result["active_version"] is None and result["average_performance"] is None and result["last_round"] is None
    assert (result["rounds"], result["learners"], result["sessions"]) == ({}, {}, 0)


def test_the_status_counts_what_there_is(engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world()
    for index, accuracy in enumerate((0.5, 0.7)):
        model = world.model(index)
        model.performance_metrics = {"accuracy": accuracy, "loss": 1.0}
        model.save()
    run(capsys, "run_federated_aggregation")
    _code, result, _err = run(capsys, "federation_status")
    assert result["active_version"] == active_version().version
    assert result["main_versions"] == {"ACTIVE": 1, "ARCHIVED": 1}
    assert result["learners"] == {"ACTIVE": 6} and result["active_learner_models"] == 6
    assert result["sessions"] == 12 and result["total_federated_updates"] == 1
    assert result["average_performance"] == pytest.approx(0.6)
    assert result["rounds"] == {"PROMOTED": 1} and result["last_round"]["state"] == "PROMOTED"
    assert result["jobs"] == {"SUCCEEDED": 1}
    call_command("federation_status")
    assert "average performance" in capsys.readouterr().out


def test_promote_and_rollback_move_the_active_version_and_its_learners(
    engine: ShrinkingEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.factor = 2.0
    world = make_world()
    _code, round_, _err = run(capsys, "run_federated_aggregation")

    code, result, _err = run(capsys, "promote_main_model", round_["candidate_version"], "--reason", "by decision")
    assert (code, result["active_version"], result["previous_version"]) == (0, round_["candidate_version"], world.version.version)
    assert result["rebase"]["rebased"] == 6

    code, result, _err = run(capsys, "rollback_main_model", "--to", world.version.version, "--reason", "worse")
    assert (code, result["active_version"]) == (0, world.version.version)
    assert world.model(0).source_version == world.version


def test_promotion_and_rollback_refuse_what_they_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    first = make_version(seed=1)
    second = make_version(seed=2, parent=first)
    code, result, err = run(capsys, "promote_main_model", first.version, "--reason", "again")
    assert code == 1 and result["error"]["code"] == "not_promotable" and "ARCHIVED" in err
    code, result, err = run(capsys, "rollback_main_model", "--to", second.version, "--reason", "again")
    assert code == 1 and result["error"]["code"] == "not_archived" and first.version in err
    code, _result, err = run(capsys, "rollback_main_model", "--to", "aivo-main-v77", "--reason", "again")
    assert code == 2 and second.version in err
    code, _result, _err = run(capsys, "promote_main_model", first.version, "--reason", "")
    assert code == 1
    with pytest.raises(CommandError):
        call_command("rollback_main_model")
    assert MainModelVersion.objects.get(status="ACTIVE") == second
