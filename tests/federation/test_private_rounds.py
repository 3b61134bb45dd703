"""Rounds with differential privacy: drawn, bounded, noised once, charged before release; what is not private is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.core.files.storage import storages
from django.db import transaction

from aivo_core import privacy_mechanisms
from aivo_core.engine.contract import LearnerResult
from aivo_core.privacy import global_norm
from aivo_site.audit.models import AuditEvent
from aivo_site.errors import UsageError
from federation import privacy_periods, strategies
from federation.errors import ManagerError, PeriodError
from federation.ledger_check import verify_ledger
from federation.manager import FederatedLearningManager
from federation.models import (
    AggregationRound,
    Contribution,
    FederatedUpdate,
    FederationPolicy,
    PrivacyLedgerEntry,
    PrivacyPeriod,
    RoundAttempt,
    RoundState,
    Verdict,
)
from federation.policies import PolicyError
from federation.privacy.accountant import epsilon
from federation.privacy.self_test import spread_bounds
from federation.rounds import aggregation, candidate, intake, lifecycle, partial_sums, private, running, service
from federation.rounds.errors import RoundFailed, RoundSkipped, RoundStopped
from federation.rounds.gate import GateDecision
from models_store import store
from models_store.models import MainModelVersion
from models_store.versions import active_version
from tests.federation.rounds_world import ShrinkingEngine, World, make_world, person, set_policy, with_model
from tests.federation.test_rounds_crash import Killed, expire_leases
from tests.federation.test_sharded_rounds import cut  # noqa: F401 - a fixture
from tests.learners.test_commands import run as shown
from tests.models_store.factories import SMALL
from tests.site.worker_processes import environment

POPULATION = 8
PRIVATE: dict[str, Any] = {"differential_privacy": True, "clip_norm": 1.0, "noise_multiplier": 1.0}


def private_world(*, learners: int = 6, policy: dict[str, Any] | None = None, **terms: Any) -> World:
    """A world whose policy is private, with an open period of ``POPULATION`` learners."""
    world = make_world(learners=learners, policy={**PRIVATE, **(policy or {})})
    begin(**terms)
    return world


def begin(**terms: Any) -> PrivacyPeriod:
    values = privacy_periods.PeriodTerms(**{"population": POPULATION, "planned_rounds": 5, **terms})
    return privacy_periods.begin_period(terms=values, meaning="a test year", actor="test")


def aggregate_of(attempt: RoundAttempt) -> Any:
    return store.read_aggregate(path=attempt.aggregate_path, sha256=attempt.aggregate_sha256, spec=SMALL)


def run() -> dict[str, Any]:
    """One round, however the gate decides."""
    return service.aggregate()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of 0, so that what lies under it can be looked at."""
    monkeypatch.setattr(privacy_mechanisms, "gaussian", lambda size, _std, rng=None: np.zeros(size))


# --- A private round ----------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_private_round_is_charged_and_says_what_its_figure_means(engine: ShrinkingEngine) -> None:
    world = private_world()

    result = run()

    period = PrivacyPeriod.objects.get()
    row = PrivacyLedgerEntry.objects.get()
    attempt = RoundAttempt.objects.get()
    assert result["state"] in (RoundState.PROMOTED, RoundState.REJECTED) and result["accepted"] == 6
    assert attempt.charge == row and row.round == attempt.round and row.subject_key is None
    assert (row.noise_multiplier, row.clip_norm, row.sampling, row.mechanism) == (1.0, 1.0, "none", "gaussian_sum")
    told = result["privacy"]
    expected = epsilon(z=1.0, q_num=1, q_den=1, steps=1, delta=period.delta).epsilon
    assert told["epsilon"] == told["epsilon_period"] == pytest.approx(expected) and told["delta"] == period.delta
    assert (told["unit"], told["adjacency"], told["sampling"]) == ("learner", "add_or_remove_one", "none")
    assert (told["population"], told["expected_cohort"], told["charges"]) == (8, 8.0, 1)
    assert "rdp" in told["accountant"] and "learner" in told["statement"]
    assert set(Contribution.objects.values_list("weight", flat=True)) == {1.0}
    norms = Contribution.objects.values_list("norm", "clipped_norm")
    assert all(clipped == min(norm, 1.0) for norm, clipped in norms)
    assert attempt.weight_total == 6.0 and verify_ledger().verified and world.version == attempt.round.base_version


@pytest.mark.django_db
def test_the_update_is_the_clipped_sum_over_the_expected_cohort(engine: ShrinkingEngine, silent: None) -> None:
    private_world()
    run()
    found = aggregate_of(RoundAttempt.objects.get())
    vectors = cohort_vectors(AggregationRound.objects.get())
    np.testing.assert_allclose(found, np.sum(vectors, axis=0) / POPULATION, rtol=1e-4, atol=1e-8)


@pytest.mark.django_db
def test_nothing_that_can_be_exported_says_who_took_part_or_how_many(engine: ShrinkingEngine) -> None:
    private_world()
    run()
    row = RoundAttempt.objects.get().round.candidate_version
    assert row is not None
    with storages["main_models"].open(f"{row.model_path}/manifest.json") as file:
        manifest = json.loads(file.read())
    with storages["main_models"].open(f"{row.model_path}/MODEL_CARD.md") as file:
        card = file.read().decode()
    text = json.dumps(manifest)
    for secret in (RoundAttempt.objects.get().set_digest, "contributions", "set_digest"):
        assert secret not in text and secret not in card
    assert row.training_metrics["samples"] is None
    assert manifest["lineage"]["privacy"]["charges"] == 1 and "epsilon" in card


@pytest.mark.django_db
def test_a_promoted_update_carries_its_epsilon(engine: ShrinkingEngine, silent: None) -> None:
    private_world(policy={"clip_norm": 50.0})
    result = run()
    assert result["state"] == RoundState.PROMOTED
    assert FederatedUpdate.objects.get().privacy_budget == result["privacy"]["epsilon"] > 0


@pytest.mark.django_db
def test_many_private_rounds_leave_trunk_and_statistics_as_they_were_and_nothing_is_not_a_number(
    engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.factor = 0.0
    world = private_world(policy={"noise_multiplier": 20.0, "clip_norm": 0.1}, planned_rounds=30)
    before = store.load_version(world.version)

    better = running.evidence.run_gate(
        policy=service.policy_with({}), base=before, candidate=before.tail * np.float32(0.8), progress=lambda *_told: None
    )
    assert better.passed
    # Every candidate is promoted, so that the next round builds on its noise.
    monkeypatch.setattr(running.evidence, "run_gate", lambda **_anything: better)
    monkeypatch.setattr(service, "rebase_if_active", lambda *_anything, **_options: None)
    for _ in range(30):
        assert run()["state"] == RoundState.PROMOTED
    after = store.load_version(active_version())
    frozen, moved = before.spec.with_tail(before.weights, before.tail), after.spec.with_tail(after.weights, before.tail)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(leaves(frozen), leaves(moved), strict=True))
    assert np.isfinite(after.tail).all() and not np.array_equal(after.tail, before.tail)
    total = epsilon(z=20.0, q_num=1, q_den=1, steps=30, delta=PrivacyPeriod.objects.get().delta).epsilon
    assert PrivacyLedgerEntry.objects.first().epsilon_total == pytest.approx(total)  # type: ignore[union-attr]


def leaves(weights: Any) -> list[Any]:
    return [weights[name] for name in sorted(weights)]


# --- Noise and bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_the_measured_noise_is_what_is_accounted_for_and_doubles_with_the_clipping_norm(
    engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.factor = engine.noise = 0.0
    spreads = {}
    private_world(planned_rounds=1)
    for clip_norm in (0.5, 1.0):
        set_policy(clip_norm=clip_norm)
        drawn = [aggregate_of(attempt_of(run())) for _ in range(6)]
        noise = np.concatenate(drawn).astype(np.float64) * POPULATION
        assert len({vector.tobytes() for vector in drawn}) == 6
        low, high = spread_bounds(noise.size)
        spreads[clip_norm] = float(np.sqrt(np.mean(np.square(noise))))
        assert low <= spreads[clip_norm] / (1.0 * clip_norm) <= high
    assert low / high <= spreads[1.0] / (2.0 * spreads[0.5]) <= high / low


def attempt_of(result: dict[str, Any]) -> RoundAttempt:
    return RoundAttempt.objects.exclude(aggregate_path="").get(round__sequence=result["round"])


class OneHugeDelta(ShrinkingEngine):
    """The first learner's delta is huge."""

    size = 1e6

    def train(self, **values: Any) -> Iterator[LearnerResult]:  # type: ignore[override]
        for number, result in enumerate(super().train(**values)):
            if number == 0:
                delta = np.full(SMALL.tail_size, self.size, np.float32)
                yield LearnerResult(**{**vars_of(result), "tail": result.tail * 0 + delta, "tail_pass_delta": delta})
            else:
                yield result


def vars_of(result: LearnerResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in result.__dataclass_fields__}


@pytest.mark.django_db
def test_one_huge_delta_moves_the_update_by_at_most_c_over_n_and_is_not_compared_with_the_others(
    monkeypatch: pytest.MonkeyPatch, silent: None
) -> None:
    from federation import engines

    private_world(policy={"max_delta_norm": 1e12})
    real, updates = aggregation.weigh, []

    def without_the_first(*values: Any) -> Any:
        return real(*values)[1:]

    for engine, members in ((OneHugeDelta(), real), (ShrinkingEngine(), without_the_first)):
        with transaction.atomic(), monkeypatch.context() as patched:
            patched.setattr(engines, "get_engine", lambda name, engine=engine: engine)
            patched.setattr(aggregation, "weigh", members)
            result = run()
            assert result["accepted"] == 6 and result["rejected"] == {}
            huge = Contribution.objects.filter(norm__gt=1e6, clipped_norm=1.0).count()
            assert huge == (1 if members is real else 0)
            updates.append(aggregate_of(attempt_of(result)).astype(np.float64))
            transaction.set_rollback(True)
    assert 0.99 / POPULATION < global_norm(updates[0] - updates[1]) <= 1.0 / POPULATION * (1 + 1e-6)


# --- Charges: crashes, attempts, processes ------------------------------------------------------------------------------------


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("module", "name", "after", "charges"),
    [
        (aggregation, "fold_contributions", False, 2),
        (aggregation, "fold_contributions", True, 2),
        (store, "write_aggregate", True, 2),
        (aggregation, "reserve_candidate", True, 2),
        (candidate, "candidate_tail", False, 1),
        (running.evidence, "run_gate", True, 1),
    ],
)
def test_a_crash_after_the_charge_stays_charged_and_noise_is_drawn_again_only_where_no_file_is(
    module: Any, name: str, after: bool, charges: int, engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    private_world(planned_rounds=2)
    real = getattr(module, name)

    def dying(*values: Any, **options: Any) -> Any:
        if after:
            real(*values, **options)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(module, name, dying)
        with pytest.raises(Killed):
            run()
    assert PrivacyLedgerEntry.objects.count() == 1
    filed = RoundAttempt.objects.exclude(aggregate_path="").first()
    before = None if filed is None else aggregate_of(filed)
    expire_leases()
    result = run()

    assert PrivacyLedgerEntry.objects.count() == RoundAttempt.objects.count() == result["privacy"]["charges"] == charges
    period = PrivacyPeriod.objects.get()
    assert result["privacy"]["epsilon"] == pytest.approx(
        epsilon(z=1.0, q_num=1, q_den=1, steps=charges, delta=period.delta).epsilon
    )
    final = aggregate_of(attempt_of(result))
    assert RoundAttempt.objects.exclude(aggregate_path="").count() == 1
    assert before is None if charges == 2 else np.array_equal(before, final)
    assert all(attempt.charge is not None for attempt in RoundAttempt.objects.all())


@pytest.mark.django_db
def test_a_charge_is_committed_before_the_first_delta_is_folded(engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    private_world()
    real, seen = aggregation.fold_contributions, []

    def fold(**values: Any) -> Any:
        seen.append(PrivacyLedgerEntry.objects.count())
        return real(**values)

    monkeypatch.setattr(aggregation, "fold_contributions", fold)
    run()
    assert seen == [1]


@pytest.mark.django_db
def test_an_attempt_that_has_to_be_repeated_is_charged_again(engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    private_world(planned_rounds=2)
    real, broken = aggregation.weigh, []

    def damaging(*values: Any) -> Any:
        members = real(*values)
        if not broken:
            broken.append(members[0].deltas[0].file.path)
            path = storages["learner_models"].path(broken[0])
            with open(path, "r+b") as file:  # noqa: PTH123
                file.seek(-4, 2)
                file.write(b"\0\0\0\1")
        return members

    monkeypatch.setattr(aggregation, "weigh", damaging)
    result = run()
    assert result["rejected"] == {"checksum_mismatch": 1} and result["privacy"]["charges"] == 2
    assert [attempt.charge_id is not None for attempt in RoundAttempt.objects.all()] == [True, True]


@pytest.mark.django_db(transaction=True)
def test_three_rounds_in_three_processes_are_one_composition_of_three(tmp_path: Path) -> None:
    private_world(planned_rounds=3)
    stores = {
        "AIVO_MAIN_MODEL_PATH": str(tmp_path / "main_models"),
        "AIVO_LEARNER_MODELS_PATH": str(tmp_path / "learner_models"),
    }
    told = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-m", "tests.federation.round_process", "run_federated_aggregation", "--json", "--no-rebase"],
            env={**environment(), **stores},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout)["privacy"]["epsilon_period"])
    period = PrivacyPeriod.objects.get()
    steps = [epsilon(z=1.0, q_num=1, q_den=1, steps=n, delta=period.delta).epsilon for n in (1, 2, 3)]
    assert told == pytest.approx(steps, rel=1e-12) and told[2] < 3 * told[0]
    assert verify_ledger().verified


# --- Caps ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_cap_ends_the_round_before_anything_is_trained(engine: ShrinkingEngine) -> None:
    private_world(epsilon_cap=6.0)
    run()
    trained = engine.trained
    with pytest.raises(RoundSkipped) as skipped:
        run()
    assert skipped.value.code == "privacy_budget_spent" and "above the cap 6" in str(skipped.value)
    assert engine.trained == trained and PrivacyLedgerEntry.objects.count() == 1
    assert skipped.value.result["state"] == RoundState.SKIPPED and skipped.value.result["privacy"]["epsilon"] == 0.0


@pytest.mark.django_db
def test_a_cap_that_a_crash_used_up_ends_the_round_without_a_release(
    engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = private_world(policy={"epsilon_cap": 6.0})

    def die(**_anything: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(aggregation, "fold_contributions", die)
        with pytest.raises(Killed):
            run()
    expire_leases()
    with pytest.raises(RoundSkipped) as skipped:
        run()
    assert skipped.value.code == "privacy_budget_spent" and active_version() == world.version
    assert RoundAttempt.objects.count() == 1 and not RoundAttempt.objects.exclude(aggregate_path="").exists()


@pytest.mark.django_db
def test_a_learner_over_the_cap_is_left_out_and_who_joined_later_is_not(engine: ShrinkingEngine) -> None:
    world = private_world(learners=2, policy={"minimum_learners": 1}, epsilon_cap_learner=6.0)
    run()
    late = with_model(person("late"), active_version(), seed=77)
    result = service.aggregate(dry_run=True)
    assert result["excluded"] == {"privacy_budget_spent": 2} and result["eligible"] == 1
    run()
    last = AggregationRound.objects.order_by("sequence").last()
    assert last is not None and [row.subject_key for row in last.contributions.all()] == [late.subject_key]
    assert len(world.learners) == 2


@pytest.mark.django_db
@pytest.mark.parametrize("field", ["epsilon_cap", "epsilon_cap_learner"])
def test_an_organisations_lower_cap_leaves_its_learners_out(field: str, engine: ShrinkingEngine) -> None:
    world = private_world(learners=3, policy={"minimum_learners": 1})
    own = world.learners[0].organisation
    FederationPolicy.objects.create(organisation=own, name="school", **{field: 1.0})
    same = sum(learner.organisation_id == own.pk for learner in world.learners)
    assert service.aggregate(dry_run=True)["excluded"] == {"privacy_budget_spent": same}


@pytest.mark.django_db
def test_noise_from_a_target_is_enough_for_the_planned_rounds_and_no_more_are_run(engine: ShrinkingEngine) -> None:
    private_world(policy={"noise_multiplier": None, "target_epsilon": 8.0}, planned_rounds=2)
    first, second = run(), run()
    assert first["privacy"]["noise_multiplier"] == second["privacy"]["noise_multiplier"] > 0.5
    assert 7.9 < second["privacy"]["epsilon_period"] <= 8.0
    with pytest.raises(RoundSkipped) as skipped:
        run()
    assert skipped.value.code == "privacy_budget_spent"


# --- Cohorts ------------------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_poisson_rounds_draw_each_learner_and_charge_the_whole_population(
    engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int, int]] = []

    def draw(members: Any, q_num: int, q_den: int) -> Any:
        drawn.append((len(members), q_num, q_den))
        return [member for number, member in enumerate(members) if number in (1, 4)]

    monkeypatch.setattr(private, "poisson_cohort", draw)
    private_world(policy={"sampling": "poisson", "minimum_learners": 4}, rate=Fraction(1, 2))
    result = run()
    assert drawn == [(6, 1, 2)] and engine.trained == 2 and result["eligible"] == 6 and result["accepted"] == 2
    row = PrivacyLedgerEntry.objects.get()
    assert (row.sampling, row.q_num, row.q_den, row.subject_key) == ("poisson", 1, 2, None)
    assert (
        result["privacy"]["expected_cohort"] == 4.0 and result["privacy"]["epsilon_seeing_cohort"] > result["privacy"]["epsilon"]
    )


@pytest.mark.django_db
def test_a_cohort_of_nobody_is_released_as_noise_and_charged(engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "poisson_cohort", lambda *_anything: [])
    private_world(policy={"sampling": "poisson", "minimum_learners": 4}, rate=Fraction(1, 2))
    result = run()
    assert result["state"] in (RoundState.REJECTED, RoundState.PROMOTED) and result["accepted"] == 0
    assert np.isfinite(aggregate_of(attempt_of(result))).all() and PrivacyLedgerEntry.objects.count() == 1


@pytest.mark.django_db
def test_too_few_eligible_learners_skip_the_round_without_a_charge(engine: ShrinkingEngine) -> None:
    private_world(learners=4)
    with pytest.raises(RoundSkipped) as skipped:
        run()
    assert skipped.value.code == "too_few_learners" and not PrivacyLedgerEntry.objects.exists() and engine.trained == 0


@pytest.mark.django_db
def test_shards_clip_and_the_noise_is_drawn_once(
    engine: ShrinkingEngine,
    cut: Callable[[int], None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    silent: None,
) -> None:
    from aivo_site.jobs import services

    count = 2 * strategies.BLOCK_SIZE + 5
    make_world(learners=count, events=16, evaluators=10, policy={"min_samples": 3, **PRIVATE})
    begin(population=200)
    cut(2)
    run()  # without a job: in this process alone
    begun = AggregationRound.objects.get()
    alone = aggregate_of(RoundAttempt.objects.get())
    weights = cohort_vectors(begun)
    drawn: list[int] = []
    real = privacy_mechanisms.GaussianSumMechanism.add_noise

    def add_noise(mechanism: Any, total: Any) -> Any:
        drawn.append(1)
        return real(mechanism, total)

    monkeypatch.setattr(privacy_mechanisms.GaussianSumMechanism, "add_noise", add_noise)
    job = services.run_inline(kind="run_federated_aggregation", params={"rebase": False})
    assert job.shards.filter(phase__startswith="aggregate").count() == 2 and drawn == [1]
    shared_round = AggregationRound.objects.get(sequence=2)
    shared = aggregate_of(attempt_of({"round": 2}))
    for found, vectors in ((alone, weights), (shared, cohort_vectors(shared_round))):
        assert len(vectors) == count
        np.testing.assert_allclose(found, np.sum(vectors, axis=0) / 200.0, rtol=1e-3, atol=1e-7)
    assert partial_sums.files_in_use() == [] and PrivacyLedgerEntry.objects.count() == 2


def cohort_vectors(round_: AggregationRound) -> list[Any]:
    """The clipped deltas of a round's accepted contributions, C = 1."""
    clipped = []
    for row in round_.contributions.filter(verdict=Verdict.ACCEPTED).order_by("subject_key"):
        session = row.sessions.get()
        delta = store.read_delta(path=session.delta_path, sha256=session.delta_sha256, spec=SMALL).astype(np.float64)
        clipped.append(delta * min(1.0, 1.0 / global_norm(delta)))
    return clipped


# --- What is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_the_originals_defaults_are_refused_with_the_true_epsilon_and_run_with_a_reason(engine: ShrinkingEngine) -> None:
    private_world(planned_rounds=1)
    defaults = {"enable_differential_privacy": True, "noise_multiplier": 0.1, "clip_norm": 1.0}
    with pytest.raises(PolicyError) as refused:
        service.FederatedAggregationService(defaults).initialize()
    true = epsilon(z=0.1, q_num=1, q_den=1, steps=1, delta=1e-5).epsilon
    assert refused.value.code == "epsilon_too_large" and f"{true:.4g}" in str(refused.value) and true > 90
    set_policy(noise_multiplier=0.1, epsilon_override_reason="a trial without children")
    assert run()["privacy"]["epsilon"] == pytest.approx(true)
    assert PrivacyLedgerEntry.objects.get().override_reason == "a trial without children"
    assert AuditEvent.objects.get(action="privacy.charged").data["override_reason"] == "a trial without children"


@pytest.mark.django_db
def test_an_epsilon_that_only_the_planned_rounds_make_too_large_is_refused_too(engine: ShrinkingEngine) -> None:
    private_world(policy={"noise_multiplier": 0.5}, planned_rounds=52)
    with pytest.raises(PolicyError, match="52 planned rounds") as refused:
        run()
    assert refused.value.code == "epsilon_too_large" and not AggregationRound.objects.exists()


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("policy", "terms", "code", "words"),
    [
        ({}, None, "no_privacy_period", "privacy_period"),
        ({"sampling": "poisson"}, {}, "wrong_sampling", "sampling must be none"),
        ({}, {"rate": Fraction(3, 4)}, "wrong_sampling", "sampling must be poisson, not none"),
        ({"sampling": "poisson"}, {"rate": Fraction(1, 2)}, "cohort_too_small", "minimum_learners must be at most 4"),
        ({}, {"expected_cohort": 4.5}, "cohort_too_small", "minimum_learners must be at most 4.5"),
        (
            {"differential_privacy": False, "clip_norm": None, "noise_multiplier": None},
            {},
            "privacy_period_open",
            "period 1 is open",
        ),
    ],
)
def test_a_policy_that_does_not_go_with_the_period_is_refused_before_a_round_begins(
    policy: dict[str, Any], terms: dict[str, Any] | None, code: str, words: str, engine: ShrinkingEngine
) -> None:
    make_world(policy={**PRIVATE, **policy})
    if terms is not None:
        begin(**terms)
    for ask in (run, lambda: service.aggregate(dry_run=True)):
        with pytest.raises(UsageError, match=words) as refused:
            ask()
        assert refused.value.code == code
    assert not AggregationRound.objects.exists() and engine.trained == 0


@pytest.mark.django_db
def test_more_learners_than_were_declared_end_the_round_before_anything_is_trained(engine: ShrinkingEngine) -> None:
    private_world(learners=POPULATION)
    with_model(person("one-too-many"), active_version())
    with pytest.raises(RoundFailed) as failed:
        run()
    assert failed.value.code == "population_too_small" and "9 learners" in str(failed.value)
    assert engine.trained == 0 and not PrivacyLedgerEntry.objects.exists()


@pytest.mark.django_db
def test_a_round_keeps_its_policy_and_its_period(engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    private_world()
    check = running.STEPS[RoundState.INTAKE]

    def meddled(step: running.RoundRun) -> None:
        set_policy(clip_norm=99.0, noise_multiplier=0.5)
        for change in (
            lambda: privacy_periods.end_period(reason="now", actor="test"),
            lambda: begin(),
        ):
            with pytest.raises(PeriodError) as refused:
                change()
            assert refused.value.code == "round_running"
        check(step)

    monkeypatch.setitem(running.STEPS, RoundState.INTAKE, meddled)
    told = run()["privacy"]
    assert (told["clip_norm"], told["noise_multiplier"]) == (1.0, 1.0)


@pytest.mark.django_db
def test_a_round_that_was_cancelled_or_rejected_after_the_charge_stays_charged(
    engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch, silent: None
) -> None:
    private_world(policy={"clip_norm": 50.0}, planned_rounds=2)
    engine.factor = 2.0
    assert run()["state"] == RoundState.REJECTED
    real = aggregation.fold_contributions

    def cancelled(**values: Any) -> Any:
        lifecycle.cancel_round(round_=AggregationRound.objects.get(open_slot=1), actor="steward", reason="by hand")
        return real(**values)

    monkeypatch.setattr(aggregation, "fold_contributions", cancelled)
    with pytest.raises(RoundStopped, match="by hand"):
        run()
    assert AggregationRound.objects.filter(state=RoundState.CANCELLED).count() == 1
    assert PrivacyLedgerEntry.objects.count() == 2


@pytest.mark.django_db
def test_a_norm_far_above_the_cohorts_is_not_quarantined_in_a_private_round(
    engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    monkeypatch.setattr(intake, "quarantine_outliers", lambda *_anything: called.append(1))
    private_world(policy={"norm_outlier_factor": 1.0})
    run()
    assert not called and not Contribution.objects.filter(verdict=Verdict.QUARANTINED).exists()
    assert MainModelVersion.objects.count() == 2


@pytest.mark.django_db
def test_no_version_is_made_past_the_ledger_while_a_period_is_open() -> None:
    private_world()
    with pytest.raises(ManagerError) as refused:
        FederatedLearningManager().update_main_model("aivo-main-v1", np.zeros(SMALL.tail_size, np.float32))
    assert refused.value.code == "privacy_period_open" and MainModelVersion.objects.count() == 1


@pytest.mark.django_db
def test_the_command_says_in_words_what_a_private_round_cost(engine: ShrinkingEngine) -> None:
    private_world()
    text = shown("run_federated_aggregation", "--no-rebase")
    assert "whether a learner took part" in text and "epsilon = " in text
    assert "whether a learner took part" in shown("privacy_report")
    with pytest.raises(PolicyError) as refused:
        service.policy_with({"differential_privacy": False})
    assert refused.value.code == "needs_privacy"


# --- Differencing -------------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
@pytest.mark.parametrize("passes", [True, False])
def test_no_sequence_of_features_gives_a_sum_without_noise_or_a_release_without_a_charge(
    passes: bool, engine: ShrinkingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running.evidence.run_gate

    def decided(**values: Any) -> GateDecision:
        measured = real(**values)
        report = {**measured.report, "passed": passes, "reason_code": "" if passes else "gate_worse", "reason": "arranged"}
        return replace(measured, code=report["reason_code"], report=report)

    monkeypatch.setattr(running.evidence, "run_gate", decided)
    world = private_world(planned_rounds=4)
    first = run()
    exact = np.sum(cohort_vectors(AggregationRound.objects.get()), axis=0) / POPULATION
    service.aggregate(dry_run=True)
    for command in (("federation_status",), ("privacy_report", "--verify"), ("collect_garbage",)):
        shown(*command)
    candidate_name = first["candidate_version"]
    if not passes:
        service.promote(version=candidate_name, reason="to see more of it", actor="test", with_rebase=False)
    service.roll_back(version=None, reason="and back", actor="test")
    with_model(person("one-more"), active_version(), seed=9)
    run()
    world.learners[0].consent_contribution = False
    world.learners[0].save()
    run()
    with pytest.raises(PolicyError):
        service.aggregate(overrides={"differential_privacy": False, "clip_norm": None, "noise_multiplier": None})
    with pytest.raises(ManagerError):
        FederatedLearningManager().update_main_model(active_version().version, exact.astype(np.float32))

    attempts = RoundAttempt.objects.exclude(aggregate_path="")
    updates = [aggregate_of(attempt).astype(np.float64) for attempt in attempts]
    assert len(updates) == PrivacyLedgerEntry.objects.count() == 3
    base = store.load_version(world.version).tail.astype(np.float64)
    published = [store.load_version(row).tail - base for row in MainModelVersion.objects.exclude(pk=world.version.pk)]
    noise = SMALL.tail_size**0.5 / POPULATION
    for release in (*updates, *published):
        assert global_norm(release - exact) > 0.5 * noise
    for one in range(3):
        for other in range(one):
            assert global_norm(updates[one] - updates[other]) > 0.5 * noise, "the same noise was used twice"
    files = [name for name in stored_files("rounds") if name.endswith(".safetensors")]
    assert sorted(files) == sorted(attempts.values_list("aggregate_path", flat=True))


def stored_files(folder: str) -> list[str]:
    """Every file below a folder of the store of main models."""
    folders, files = storages["main_models"].listdir(folder)
    return [f"{folder}/{name}" for name in files] + [found for name in folders for found in stored_files(f"{folder}/{name}")]
