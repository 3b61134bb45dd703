"""Bad input to every command: the exit code, a message that names the field and what is allowed, and nothing changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.core.management import get_commands, load_command_class
from django.db import connections

from aivo_site.jobs.models import Job, JobState
from federation.models import AggregationRound
from federation.policies import default_policy
from learners.models import Pool
from models_store.models import MainModelVersion, VersionStatus
from tests.federation.rounds_world import make_world, person, with_events
from tests.models_store.factories import make_learner, make_version

pytestmark = pytest.mark.django_db

DONE, FAILED, USAGE, SKIPPED = 0, 1, 2, 3
RECORDS = {"jobs.Job", "jobs.JobLog"}
"""A refusal may leave the job that was refused, with its reason."""


@dataclass(frozen=True)
class Ran:
    """How one run from the command line ended."""

    code: int
    out: str
    err: str

    @property
    def object(self) -> dict[str, Any]:
        assert self.out.count("\n") == 1, self.out
        found: dict[str, Any] = json.loads(self.out)
        return found


class Shell:
    """Runs commands as ``manage.py`` does, in this process and within the test's transaction."""

    def __init__(self, capsys: pytest.CaptureFixture[str], store: Path) -> None:
        self._capsys = capsys
        self._store = store

    def run(self, *arguments: str) -> Ran:
        name, *rest = arguments
        self._capsys.readouterr()
        code = 0
        command = load_command_class(get_commands()[name], name)
        checks = ["--skip-checks"] if command.requires_system_checks else []
        try:
            command.run_from_argv(["manage.py", name, *checks, *rest])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = self._capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    def refused(self, *arguments: str, code: int, names: tuple[str, ...], besides: set[str] | None = None) -> Ran:
        """The run, which must have told why and changed nothing ``besides`` these tables."""
        ignored = RECORDS | (besides or set())
        before = self._state(ignored)
        ran = self.run(*arguments, "--json")
        assert ran.code == code, ran
        assert "Traceback" not in ran.err, ran.err
        for name in names:
            assert name.lower() in ran.err.lower(), f"{name!r} is not in {ran.err!r}"
        if code == USAGE:
            assert ran.out == ""
        else:
            assert ran.object["error"]["code"] and ran.object["error"]["message"] in ran.err
        after = self._state(ignored)
        assert after == before, "something changed"
        assert not Job.objects.filter(state__in=(JobState.QUEUED, JobState.RUNNING)).exists()
        return ran

    def _state(self, ignored: set[str]) -> dict[str, Any]:
        rows: dict[str, Any] = {
            model._meta.label: sorted(map(repr, model._default_manager.values()))
            for model in apps.get_models(include_auto_created=True)
            if model._meta.label not in ignored
        }
        files = {str(path): path.read_bytes() for path in self._store.rglob("*") if path.is_file()}
        return {**rows, "files": files}


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    # A command closes its connections at the end, which would end the test's transaction.
    monkeypatch.setattr(connections, "close_all", lambda: None)
    default_policy()
    yield Shell(capsys, tmp_path)


@pytest.fixture
def world() -> None:
    """Version 1 archived, 2 active, 3 a candidate; three learners with models, two who evaluate, one organisation."""
    make_version(seed=7)
    made = make_world(learners=3, evaluators=2)
    make_version(seed=8, active=False, parent=made.version)
    statuses = dict(MainModelVersion.objects.values_list("sequence", "status"))
    assert statuses == {1: VersionStatus.ARCHIVED, 2: VersionStatus.ACTIVE, 3: VersionStatus.CANDIDATE}


POOLS = tuple(pool.lower() for pool in Pool.values)
BLOCKS = ("shared_dense_1", "shared_bn_1", "shared_dropout_1")

PERIOD = ("privacy_period", "begin", "--reason", "r", "--population", "100")

USAGE_CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "clone: unknown learner": (("clone_learner_models", "--learner", "nobody"), ("learner", "nobody")),
    "clone: unknown organisation": (("clone_learner_models", "--organisation", "nowhere"), ("organisation", "nowhere", "school")),
    "privacy report: rate": (("privacy_report", "--calibrate", "1", "--rate", "2/1"), ("--rate", "above 0 and at most 1")),
    "privacy report: target": (("privacy_report", "--calibrate", "-1", "--population", "100"), ("epsilon", "positive")),
    "privacy report: target NaN": (("privacy_report", "--calibrate", "nan", "--population", "100"), ("epsilon", "positive")),
    "privacy report: no population": (("privacy_report", "--calibrate", "1"), ("--population",)),
    "privacy report: rounds": (
        ("privacy_report", "--calibrate", "1", "--population", "100", "--rounds", "0"),
        ("steps", "at least 1"),
    ),
    "period: no reason": (("privacy_period", "begin", "--population", "100", "--reason", " "), ("reason",)),
    "period: no population": (("privacy_period", "begin", "--reason", "r"), ("population", "at least 2")),
    "period: population": ((*PERIOD, "--population", "1"), ("population", "at least 2")),
    "period: fewer than there are": ((*PERIOD, "--population", "2"), ("population", "3 learners")),
    "period: delta of one over N": ((*PERIOD, "--delta", "0.01"), ("delta", "1/N")),
    "period: delta 0": ((*PERIOD, "--delta", "0"), ("delta", "between 0 and 1")),
    "period: rate 0": ((*PERIOD, "--rate", "0"), ("--rate", "above 0")),
    "period: rate above 1": ((*PERIOD, "--rate", "1.5"), ("--rate", "at most 1")),
    "period: rate no number": ((*PERIOD, "--rate", "few"), ("--rate", "1/10")),
    "period: expected cohort": ((*PERIOD, "--rate", "1/10", "--expected-cohort", "11"), ("expected_cohort", "from 1 to", "10")),
    "period: expected cohort below 1": ((*PERIOD, "--rate", "1/1000"), ("expected_cohort", "from 1")),
    "period: cap": ((*PERIOD, "--epsilon-cap", "0"), ("epsilon_cap", "positive")),
    "period: none is open": (("privacy_period", "end", "--reason", "r"), ("no privacy period is open",)),
    "clone: unknown pool": (("clone_learner_models", "--pool", "gym"), ("--pool", "gym", *POOLS)),
    "clone: limit": (("clone_learner_models", "--limit", "0"), ("limit", "at least 1")),
    "clone: freeze list that is no prefix": (("clone_learner_models", "--freeze-layers", "shared_dense_2"), ("freeze", *BLOCKS)),
    "clone: half a block": (("clone_learner_models", "--freeze-layers", "shared_bn_1"), ("freeze", *BLOCKS[:2])),
    "clone: unknown layer": (("clone_learner_models", "--freeze-layers", "hidden_9"), ("hidden_9", *BLOCKS)),
    "clone: empty freeze list": (("clone_learner_models", "--freeze-layers", ","), ("--freeze-layers",)),
    "train: unknown learner": (("train_learner_models", "--learner", "nobody"), ("learner", "nobody")),
    "train: unknown organisation": (("train_learner_models", "--organisation", "nowhere"), ("organisation", "nowhere", "school")),
    "train: limit": (("train_learner_models", "--limit", "0"), ("limit", "at least 1")),
    "train: epochs 0": (("train_learner_models", "--epochs", "0"), ("epochs", "at least 1")),
    "train: epochs no number": (("train_learner_models", "--epochs", "many"), ("--epochs", "many")),
    "train: batch size": (("train_learner_models", "--batch-size", "0"), ("batch_size", "at least 1")),
    "train: rate 0": (("train_learner_models", "--learning-rate", "0"), ("learning_rate", "positive")),
    "train: rate below 0": (("train_learner_models", "--learning-rate", "-0.1"), ("learning_rate", "positive")),
    "train: rate no number": (("train_learner_models", "--learning-rate", "nan"), ("learning_rate", "positive")),
    "train: unknown engine": (("train_learner_models", "--engine", "magic"), ("engine", "keras", "magic")),
    "train: unknown adaptation": (
        ("train_learner_models", "--adaptation", "magic"),
        ("adaptation", "tail", "difficulty_bias", "tail_then_bias"),
    ),
    "main: epochs 0": (("train_main_model", "--epochs", "0"), ("--epochs", "at least 1")),
    "main: batch size": (("train_main_model", "--batch-size", "1"), ("--batch-size", "at least 2")),
    "main: seed": (("train_main_model", "--seed", "-1"), ("--seed", "at least 0")),
    "main: rate 0": (("train_main_model", "--learning-rate", "0"), ("--learning-rate", "positive")),
    "main: rate below 0": (("train_main_model", "--learning-rate", "-1"), ("--learning-rate", "positive")),
    "main: rate without bound": (("train_main_model", "--learning-rate", "inf"), ("--learning-rate", "positive")),
    "round: unknown strategy": (
        ("run_federated_aggregation", "--strategy", "magic"),
        ("strategy", "magic", "fedavg", "fedprox", "weighted"),
    ),
    "round: rate 0": (("run_federated_aggregation", "--server-lr", "0"), ("server_learning_rate", "positive")),
    "round: rate below 0": (("run_federated_aggregation", "--server-lr", "-0.5"), ("server_learning_rate", "positive")),
    "round: rate no number": (("run_federated_aggregation", "--server-lr", "nan"), ("server_learning_rate", "positive")),
    "round: no learners": (("run_federated_aggregation", "--min-learners", "0"), ("minimum_learners", "at least 1")),
    "round: no days": (("run_federated_aggregation", "--max-stale-days", "0"), ("max_stale_days", "at least 1")),
    "round: unknown source": (
        ("run_federated_aggregation", "--contribution", "magic"),
        ("contribution_source", "round", "sessions"),
    ),
    "round: unknown promotion": (("run_federated_aggregation", "--promotion", "magic"), ("promotion", "automatic", "manual")),
    "round: the dry run too": (("run_federated_aggregation", "--dry-run", "--strategy", "magic"), ("strategy", "fedavg")),
    "round: in the background too": (
        ("run_federated_aggregation", "--background", "--server-lr", "0"),
        ("server_learning_rate",),
    ),
    "promote: unknown version": (
        ("promote_main_model", "aivo-main-v99", "--reason", "why not"),
        ("version", "aivo-main-v99", "aivo-main-v3", "aivo-main-v2", "aivo-main-v1"),
    ),
    "promote: path out of the store": (("promote_main_model", "../../etc", "--reason", "why not"), ("version", "aivo-main-v3")),
    "promote: without reason": (("promote_main_model", "aivo-main-v3"), ("--reason",)),
    "rollback: unknown version": (("rollback_main_model", "--to", "v1", "--reason", "why not"), ("version", "aivo-main-v1")),
    "rollback: without reason": (("rollback_main_model", "--to", "aivo-main-v1"), ("--reason",)),
    "import: unknown pool": (("import_interactions", "x.csv", "--pool", "gym"), ("--pool", "gym", *POOLS)),
    "import: without pool": (("import_interactions", "x.csv"), ("--pool",)),
    "import: unknown consent": (
        ("import_interactions", "x.csv", "--pool", "federated", "--consent", "dancing", "--authority", "a form"),
        ("--consent", "training", "contribution", "external_transfer"),
    ),
    "import: consent without authority": (
        ("import_interactions", "x.csv", "--pool", "federated", "--consent", "training"),
        ("--authority",),
    ),
    "import: unknown organisation": (
        ("import_interactions", "x.csv", "--pool", "federated", "--organisation", "nowhere"),
        ("organisation", "nowhere", "school"),
    ),
    "consent: unknown learner": (("record_consent", "nobody", "--give", "training", "--authority", "a form"), ("learner_id",)),
    "consent: unknown kind": (
        ("record_consent", "fed-0", "--give", "dancing", "--authority", "a form"),
        ("training", "contribution", "external_transfer"),
    ),
    "consent: without authority": (("record_consent", "fed-0", "--give", "training"), ("--authority",)),
    "consent: neither given nor withdrawn": (("record_consent", "fed-0", "--authority", "a form"), ("--give", "--withdraw")),
    "simulate: too few events": (("simulate_learners", "--events", "1", "--out", "x.csv"), ("--events", "at least 2")),
    "simulate: no learners": (("simulate_learners", "--learners", "0", "--out", "x.csv"), ("learners", "at least 1")),
    "simulate: no such folder": (("simulate_learners", "--out", "no/such/folder/x.csv"), ("--out", "folder")),
    "garbage: age below 0": (("collect_garbage", "--older-than-hours", "-1"), ("--older-than-hours", "0 or more")),
    "garbage: age no number": (("collect_garbage", "--older-than-hours", "nan"), ("--older-than-hours", "0 or more")),
    "job: no id": (("run_job", "seven"), ("job", "seven")),
    "job: unknown": (("run_job", "6f1f0b3c-6a0f-4a53-9a77-0d6f3f0f0a01"), ("6f1f0b3c",)),
    "worker: unknown queue": (("worker", "--queue", "gpu"), ("--queue", "default", "training")),
    "watchdog: unknown queue": (("watchdog", "--queue", "gpu"), ("--queue", "default", "training")),
    "watchdog: interval 0": (("watchdog", "--interval", "0"), ("--interval", "above 0")),
    "demo: unknown size": (("demo", "--size", "huge"), ("--size", "small", "normal")),
    "unknown option": (("federation_status", "--everything"), ("--everything",)),
}  # fmt: skip


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("case", USAGE_CASES)
def test_wrong_usage_exits_2_names_what_is_allowed_and_changes_nothing(case: str, shell: Shell) -> None:
    arguments, names = USAGE_CASES[case]
    shell.refused(*arguments, code=USAGE, names=names)


FAILURE_CASES: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "promote: no reason in it": (("promote_main_model", "aivo-main-v3", "--reason", "  "), "no_reason", ("reason",)),
    "promote: archived": (
        ("promote_main_model", "aivo-main-v1", "--reason", "why not"),
        "not_promotable",
        ("aivo-main-v1", "ARCHIVED", "aivo-main-v3"),
    ),
    "promote: active": (
        ("promote_main_model", "aivo-main-v2", "--reason", "why not"),
        "not_promotable",
        ("ACTIVE", "aivo-main-v3"),
    ),
    "rollback: to a candidate": (
        ("rollback_main_model", "--to", "aivo-main-v3", "--reason", "why not"),
        "not_archived",
        ("aivo-main-v3", "CANDIDATE", "aivo-main-v1"),
    ),
    "rollback: to the active one": (
        ("rollback_main_model", "--to", "aivo-main-v2", "--reason", "why not"),
        "not_archived",
        ("ACTIVE", "aivo-main-v1"),
    ),
    "rollback: no parent": (("rollback_main_model", "--reason", "why not"), "not_archived", ("parent", "aivo-main-v1")),
    "import: no such file": (("import_interactions", "no-such.csv", "--pool", "federated"), "file_not_found", ("no-such.csv",)),
    "main: zero samples": (("train_main_model",), "no_curriculum_learners", ("curriculum", "import_interactions")),
    "prepare: zero samples": (("prepare_curriculum_data",), "no_curriculum_learners", ("curriculum", "import_interactions")),
    "demo: other learners": (("demo", "--size", "small"), "demo_refused", ("learners",)),
}  # fmt: skip


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("case", FAILURE_CASES)
def test_what_cannot_be_done_exits_1_with_one_object_and_changes_nothing(case: str, shell: Shell) -> None:
    arguments, code, names = FAILURE_CASES[case]
    ran = shell.refused(*arguments, code=FAILED, names=names)
    assert ran.object["error"]["code"] == code


@pytest.mark.parametrize(
    "arguments",
    [
        ("clone_learner_models",),
        ("clone_learner_models", "--freeze-layers", "shared_dense_1"),
        ("train_learner_models",),
        ("run_federated_aggregation",),
        ("run_federated_aggregation", "--dry-run"),
        ("rollback_main_model", "--reason", "why not"),
    ],
    ids=" ".join,
)
def test_without_a_main_model_exits_1_naming_the_command_that_makes_one(arguments: tuple[str, ...], shell: Shell) -> None:
    make_learner("fed-0")
    ran = shell.refused(*arguments, code=FAILED, names=("train_main_model",))
    assert ran.object["error"]["code"] == "no_main_model"


def test_learners_without_samples_are_not_trained_and_the_command_is_skipped(shell: Shell) -> None:
    make_world(learners=2, evaluators=0, events=0, sessions=False)
    ran = shell.refused("train_learner_models", code=SKIPPED, names=("too_few_samples",))
    assert ran.object["skipped"] == {"too_few_samples": 2} and ran.object["trained"] == 0


def test_curriculum_learners_with_one_interaction_have_no_sample_to_train_main_on(shell: Shell) -> None:
    make_world(learners=0, evaluators=1, events=1)
    for number in range(4):
        with_events(person(f"cur-{number}", pool=Pool.CURRICULUM), number, 1)
    ran = shell.refused("train_main_model", code=FAILED, names=("curriculum", "interactions"))
    assert ran.object["error"]["code"] in ("no_curriculum_learners", "too_few_learners")


@pytest.mark.usefixtures("world")
def test_nobody_to_clone_is_skipped_with_the_reason(shell: Shell) -> None:
    shell.refused("clone_learner_models", "--pool", "curriculum", code=SKIPPED, names=("learner",))


@pytest.mark.usefixtures("world")
def test_more_learners_asked_for_than_exist_is_skipped_and_only_the_skipped_round_is_kept(shell: Shell) -> None:
    kept = {"federation.AggregationRound", "audit.AuditEvent"}
    ran = shell.refused(
        "run_federated_aggregation", "--min-learners", "99", code=SKIPPED, names=("3 learners", "at least 99"), besides=kept
    )
    assert ran.object["error"]["code"] == "too_few_learners"
    assert (ran.object["state"], ran.object["eligible"], ran.object["candidate_version"]) == ("SKIPPED", 3, None)
    assert (AggregationRound.objects.get().state, AggregationRound.objects.get().open_slot) == ("SKIPPED", None)
