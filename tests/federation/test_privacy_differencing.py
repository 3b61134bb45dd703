"""No feature of the product makes of a private round a sum without noise, two sums with one noise, or an uncharged release.

After each walk everything in the main store is compared with what the round summed: every update, and every version less its
base, must differ from the clipped mean by the whole noise that was charged for; any two must be the same release or differ by
two independent noises; and there may not be more releases than charges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from django.core.files.storage import storages

from aivo_core import privacy_mechanisms
from aivo_core.tensors import read_any
from aivo_site.jobs import services as jobs
from federation import privacy_periods, strategies
from federation.errors import ManagerError
from federation.manager import FederatedLearningManager, LocalUpdate
from federation.models import (
    AggregationRound,
    Contribution,
    ModelTrainingSession,
    PrivacyLedgerEntry,
    PrivacyPeriod,
    RoundAttempt,
    RoundState,
)
from federation.policies import default_policy
from federation.privacy_reporting import privacy_report
from federation.rounds import aggregation, evidence, lifecycle, partial_sums, promotion, service
from learners.models import Learner
from models_store import store
from models_store.files import list_files
from models_store.garbage import collect_garbage
from models_store.models import MainModelVersion, VersionStatus
from models_store.verification import verify_store
from models_store.versions import active_version
from tests.federation.rounds_world import ShrinkingEngine, make_world, set_policy
from tests.federation.test_private_rounds import PRIVATE, begin, cohort_vectors, private_world
from tests.federation.test_rounds_crash import Killed, expire_leases
from tests.federation.test_sharded_rounds import Killed as KilledShared
from tests.federation.test_sharded_rounds import cut, run_once  # noqa: F401 - a fixture
from tests.models_store.factories import SMALL

Vector = npt.NDArray[np.float64]


@pytest.fixture(autouse=True)
def _database_and_engine(db: None, engine: ShrinkingEngine) -> None:
    """Every test has a database and the fast engine."""


def expected_cohort() -> float:
    return privacy_periods.expected_cohort(PrivacyPeriod.objects.get())


def clipped_mean(round_: AggregationRound) -> Vector:
    return np.asarray(np.sum(cohort_vectors(round_), axis=0) / expected_cohort(), dtype=np.float64)


def stored_updates() -> dict[str, tuple[Vector, Vector]]:
    """Every update and version of a round in the main store: its update, and what that has beside the round's clipped mean."""
    means = {round_.sequence: clipped_mean(round_) for round_ in AggregationRound.objects.all()}
    found = {}
    for file in list_files(alias="main_models"):
        if file.path.startswith("rounds/") and not file.is_temporary:
            with storages["main_models"].open(file.path) as opened:
                tensors = read_any(opened.read())
            assert sum(value.size for value in tensors.values()) == SMALL.tail_size, f"{file.path} is no update"
            update = ordered(file.path)
            found[file.path] = update, update - means[int(file.path.split("/")[1])]
    for round_ in AggregationRound.objects.exclude(candidate_version=None).exclude(candidate_version__model_path=""):
        made, base = store.load_version(round_.candidate_version), store.load_version(round_.base_version)  # type: ignore[arg-type]
        moved = made.tail.astype(np.float64) - base.tail.astype(np.float64)
        update = moved / float(round_.policy["server_learning_rate"])
        found[made.version] = update, update - means[round_.sequence]
    return found


def ordered(path: str) -> Vector:
    """An update file's numbers in the tail's order."""
    with storages["main_models"].open(path) as file:
        data = file.read()
    return store.read_aggregate(path=path, sha256=hashlib.sha256(data).hexdigest(), spec=SMALL).astype(np.float64)


def check_store(*, releases: int | None = None) -> None:
    """See the module's docstring.

    Args:
        releases: how many different ones there must be; as many as charges where not given.
    """
    std = 1.0 / expected_cohort()  # z C over the expected cohort, z = C = 1
    distinct: list[tuple[Vector, Vector]] = []
    for name, (update, noise) in stored_updates().items():
        assert spread(noise) == pytest.approx(std, rel=0.15), f"{name} does not carry the noise that was charged for"
        if not any(np.abs(update - other).max() < 1e-5 for other, _noise in distinct):
            for _update, other in distinct:
                assert spread(noise - other) == pytest.approx(np.sqrt(2.0) * std, rel=0.15), f"{name} shares noise with another"
            distinct.append((update, noise))
    charges = PrivacyLedgerEntry.objects.count()
    assert len(distinct) == (charges if releases is None else releases) <= charges


def spread(noise: Vector) -> float:
    return float(np.sqrt(np.mean(np.square(noise))))


def files() -> dict[str, int]:
    return {file.path: file.size for file in list_files(alias="main_models")}


@pytest.mark.parametrize("broken", [lambda size: np.zeros(size), lambda size: np.random.default_rng(0).normal(size=size)])
def test_the_check_notices_missing_noise_and_shared_noise(
    broken: Callable[[int], Vector], monkeypatch: pytest.MonkeyPatch
) -> None:
    private_world(planned_rounds=2)
    monkeypatch.setattr(privacy_mechanisms, "gaussian", lambda size, _std, rng=None: broken(size))
    service.aggregate()
    world_change()
    service.aggregate()
    with pytest.raises(AssertionError, match=r"does not carry the noise|shares noise"):
        check_store()


def world_change() -> None:
    """One learner less, so that two sums with one noise would give that learner away."""
    Learner.objects.filter(learner_id="fed-0").update(consent_contribution=False)


# --- Rounds ---------------------------------------------------------------------------------------------------------------


def test_running_again_is_another_charge_with_other_noise() -> None:
    private_world(planned_rounds=3)
    for rate in (1.0, 1.0, 2.0):
        set_policy(server_learning_rate=rate)
        service.aggregate()
    assert PrivacyLedgerEntry.objects.count() == 3
    check_store()


def test_running_again_without_one_learner_differs_by_two_noises() -> None:
    private_world(planned_rounds=2)
    service.aggregate()
    world_change()
    assert service.aggregate()["accepted"] == 5
    check_store()


@pytest.mark.parametrize(
    ("module", "name", "on_disk"),
    [
        (aggregation, "fold_contributions", 1),  # noise was drawn, and nobody ever sees it
        (store, "write_aggregate", 2),  # the file was written, its row was not: the file stays until garbage is collected
        (aggregation, "reserve_candidate", 2),
        (evidence, "run_gate", 1),  # the file and its row are there: no new noise over the same sum
    ],
)
def test_going_on_after_a_crash_never_draws_uncharged_noise(
    module: Any, name: str, on_disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    private_world(planned_rounds=2)
    real = getattr(module, name)

    def dying(*values: Any, **options: Any) -> Any:
        real(*values, **options)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(module, name, dying)
        with pytest.raises(Killed):
            service.aggregate()
    expire_leases()
    service.aggregate()
    assert AggregationRound.objects.count() == 1
    check_store(releases=on_disk)


def test_collecting_and_verifying_after_a_crash_makes_no_release_and_refunds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    private_world(planned_rounds=2)
    real = store.write_aggregate

    def dying(**options: Any) -> Any:
        real(**options)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_aggregate", dying)
        with pytest.raises(Killed):
            service.aggregate()
    for _again in range(2):
        verify_store()
        collect_garbage(older_than=timedelta(0))
    assert not [path for path in files() if path.startswith("rounds/")]
    assert PrivacyLedgerEntry.objects.count() == 1
    expire_leases()
    service.aggregate()
    verify_store()
    check_store(releases=1)
    assert PrivacyLedgerEntry.objects.count() == 2


def test_a_rejected_round_stays_one_release_and_the_next_is_another() -> None:
    private_world(policy={"promotion": "manual"}, planned_rounds=2)
    service.aggregate()
    round_ = AggregationRound.objects.get()
    if round_.state == RoundState.AWAITING_DECISION:
        promotion.decide_round(round_=round_, decision="reject", reason="no", actor="steward")
    assert service.aggregate()["round"] == 2
    check_store()


def test_a_cancelled_round_leaves_a_charge_and_no_release(monkeypatch: pytest.MonkeyPatch) -> None:
    private_world()
    real = aggregation.fold_contributions

    def cancelled(**values: Any) -> Any:
        lifecycle.cancel_round(round_=AggregationRound.objects.get(open_slot=1), actor="steward", reason="by hand")
        return real(**values)

    monkeypatch.setattr(aggregation, "fold_contributions", cancelled)
    with pytest.raises(Exception, match="by hand"):
        service.aggregate()
    files_after = [path for path in files() if path.startswith("rounds/")]
    collect_garbage(older_than=timedelta(0))
    assert len(files_after) <= 1
    check_store(releases=len([path for path in files() if path.startswith("rounds/")]))


# --- Versions -------------------------------------------------------------------------------------------------------------


def test_promoting_by_hand_and_rolling_back_only_choose_among_what_was_released() -> None:
    private_world()
    result = service.aggregate()
    made = MainModelVersion.objects.get(version=result["candidate_version"])
    before, first = files(), active_version()
    if made.status != VersionStatus.ACTIVE:
        promotion.promote_version(version=made, reason="a trial", actor="steward")
    promotion.rollback(to=None, reason="back", actor="steward")
    promotion.rollback(to=made, reason="and forward", actor="steward")
    promotion.rollback(to=None, reason="back", actor="steward")
    assert PrivacyLedgerEntry.objects.count() == 1 and MainModelVersion.objects.count() == 2
    unchanged = {path: size for path, size in files().items() if path != "ACTIVE.json"}
    assert unchanged == {path: size for path, size in before.items() if path != "ACTIVE.json"} and first is not None
    check_store()


def test_updates_combined_by_hand_are_stored_nowhere_and_become_no_version() -> None:
    private_world()
    service.aggregate()
    before = files()
    updates = [
        LocalUpdate(
            key=str(row.subject_key),
            base_version="aivo-main-v1",
            delta=store.read_delta(path=session.delta_path, sha256=session.delta_sha256, spec=SMALL),
            samples=10,
            norm=1.0,
            unclipped_norm=1.0,
            losses=(),
            seconds=0.0,
        )
        for row in Contribution.objects.all()
        for session in row.sessions.all()
    ]
    manager = FederatedLearningManager()
    outcome = manager.aggregate_updates(updates)
    for weights in (outcome, outcome.aggregated_weights):
        with pytest.raises(ManagerError) as refused:
            manager.update_main_model("aivo-main-v1", weights)
        assert refused.value.code == "privacy_period_open"
    assert files() == before and MainModelVersion.objects.count() == 2
    check_store()


def test_files_that_may_be_exported_hold_the_noised_update_and_nobodys_trace() -> None:
    private_world()
    result = service.aggregate()
    version = MainModelVersion.objects.get(version=result["candidate_version"])
    traces = list(Learner.objects.values_list("learner_id", flat=True))
    traces += [str(key) for key in Learner.objects.values_list("subject_key", flat=True)]
    traces += [row.delta_sha256 for row in ModelTrainingSession.objects.all()]
    traces += [str(row.pk) for row in ModelTrainingSession.objects.all()]
    traces += [attempt.set_digest for attempt in RoundAttempt.objects.all()]
    traces += [repr(row.norm) for row in Contribution.objects.all()]
    exported = [path for path in files() if path.startswith(f"{version.model_path}/")]
    assert len(exported) >= 4
    for path in exported:
        with storages["main_models"].open(path) as file:
            data = file.read()
        assert not [trace for trace in traces if trace.encode() in data], path
    metadata = json.dumps([version.metadata, version.training_metrics])
    assert not [trace for trace in traces if trace in metadata]
    check_store()


# --- What is told ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_reads_no_delta_and_charges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    private_world()
    before = files()

    def never(*_values: Any, **_options: Any) -> Any:
        raise AssertionError("a dry run must not sum anything")

    for name in ("fold_contributions", "weigh"):
        monkeypatch.setattr(aggregation, name, never)
    monkeypatch.setattr(store, "read_delta", never)
    told = service.aggregate(dry_run=True)
    assert set(told) == {"dry_run", "base_version", "eligible", "excluded", "minimum_learners", "learners", "seconds"}
    assert all(set(entry) == {"learner_id", "eligible", "reason"} for entry in told["learners"])
    assert files() == before and not PrivacyLedgerEntry.objects.exists() and not AggregationRound.objects.exists()


def test_the_gates_figures_are_made_of_the_noised_candidate_alone() -> None:
    private_world()
    result = service.aggregate()
    round_ = AggregationRound.objects.get()
    assert round_.candidate_version is not None
    base, made = store.load_version(round_.base_version), store.load_version(round_.candidate_version)
    again = evidence.run_gate(policy=service.policy_with({}), base=base, candidate=made.tail, progress=lambda *_told: None)
    assert json.loads(json.dumps(again.report)) == round_.gate == result["gate"]
    assert PrivacyLedgerEntry.objects.count() == 1
    check_store()


def test_job_results_and_reports_hold_no_sum_no_delta_and_nobodys_norm() -> None:
    private_world()
    job = jobs.run_inline(kind="run_federated_aggregation", params={"rebase": False})
    texts = [json.dumps(job.result), json.dumps(privacy_report(), default=str)]
    texts += [json.dumps(shard.result) for shard in job.shards.all()]
    secret = [repr(norm) for norm in Contribution.objects.values_list("norm", flat=True)]
    secret += [repr(norm) for norm in Contribution.objects.values_list("clipped_norm", flat=True) if norm != 1.0]
    secret += [attempt.set_digest for attempt in RoundAttempt.objects.all()]
    mean = clipped_mean(AggregationRound.objects.get())
    secret += [repr(float(np.linalg.norm(mean)))]
    for text in texts:
        assert not [value for value in secret if value in text]
        assert longest_list_of_numbers(json.loads(text)) < 20
    check_store()


def longest_list_of_numbers(value: Any) -> int:
    if isinstance(value, dict):
        return max(map(longest_list_of_numbers, value.values()), default=0)
    if isinstance(value, list):
        own = len(value) if value and all(isinstance(one, int | float) for one in value) else 0
        return max([own, *map(longest_list_of_numbers, value)])
    return 0


# --- Shared aggregation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goes_on", [True, False])
def test_partial_sums_left_by_a_dead_run_become_no_release(
    goes_on: bool,
    cut: Callable[[int], None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They carry no noise. The run that goes on charges and folds again; where none does, garbage collection removes them."""
    count = 2 * strategies.BLOCK_SIZE + 5
    make_world(learners=count, events=16, evaluators=10, policy={"min_samples": 3, **PRIVATE})
    begin(population=200, planned_rounds=2)
    cut(2)
    queued = jobs.enqueue(kind="run_federated_aggregation", params={"rebase": False})
    with monkeypatch.context() as patched:
        patched.setattr(partial_sums, "merge", killed)
        patched.setattr(partial_sums, "discard", killed)
        with pytest.raises(KilledShared):
            run_once(queued)
    left = [path for path in files() if "/blocks-" in path]
    assert len(left) == 2
    assert len(RoundAttempt.objects.filter(aggregate_path="")) == PrivacyLedgerEntry.objects.count() == 1
    if goes_on:
        result = run_once(queued)
        assert result["privacy"]["charges"] == 2 and result["resumed"]
        assert not any("path" in (shard.result or {}) for shard in queued.shards.all())
        check_store(releases=1)
    else:
        lifecycle.cancel_round(round_=AggregationRound.objects.get(), actor="steward", reason="by hand")
        jobs.request_cancel(job=queued, actor="steward")
        collect_garbage(older_than=timedelta(0))
        assert not RoundAttempt.objects.exclude(aggregate_path="").exists()
    assert not [path for path in files() if "/blocks-" in path]


def killed(*_values: Any, **_options: Any) -> Any:
    raise KilledShared


# --- Without privacy ------------------------------------------------------------------------------------------------------


def test_a_round_without_privacy_after_the_period_is_counted_as_uncharged() -> None:
    private_world()
    service.aggregate()
    off = {"differential_privacy": False, "clip_norm": None, "noise_multiplier": None}
    set_policy(**off)
    with pytest.raises(Exception, match="period 1 is open"):
        service.aggregate()
    privacy_periods.end_period(reason="the year is over", actor="steward")
    service.aggregate()
    assert privacy_report()["attempts_without_charge"] == 1
    assert default_policy().differential_privacy is False and PrivacyLedgerEntry.objects.count() == 1
