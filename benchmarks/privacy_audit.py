"""An empirical audit of both claims of privacy: what membership attacks find, against the ε that is claimed.

    python -m benchmarks.privacy_audit [--full] [--releases 2000] [--tail-releases 200] [--confidence 0.999] [--json]

The attack (``benchmarks.privacy_attack``) makes many releases with and without one learner and bounds ε from below, with
confidence. For mechanisms that are what they claim to be, the bound must lie below the claim; for broken ones (half the noise,
each tensor clipped by itself, a learner counted twice, no noise) above it. The row *delta files* goes the way of a round: files
of the default network's size in a learner store, read, verified, clipped and folded by ``federation.rounds.folding``, and noise
from the secure generator. The others fold vectors of fewer numbers in memory: the attacker looks at the sum along
one direction, in which the noise is the same whatever the number of coordinates.

The row *training sample* asks of the product's engine whether one sample was among those of a private training
(``benchmarks.privacy_sample_attack``): the default network's tail, every sample in every step.

The noise is never seeded, so figures differ from run to run; a claim that holds is contradicted with probability of at most
1 - confidence in each row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

from benchmarks import installation
from benchmarks.harness import TAIL_NUMBERS, Benchmark, Report, Table, in_child, rounded

DELTA = 1e-5
CLIP_NORM = 0.5
COHORT = 8.0
DIM = 16


@dataclass(frozen=True)
class Case:
    """One mechanism that is attacked.

    Attributes:
        holds: whether its claim is true. mechanism: a name in ``benchmarks.privacy_attack``, or the product's own.
    """

    name: str
    z: float
    holds: bool = True
    mechanism: str = "GaussianSumMechanism"
    copies: int = 1
    rate: tuple[int, int] = (1, 1)
    steps: int = 1


FILES = Case("delta files, the whole tail", 1.0)
TRAINING = Case("training sample, 4 steps, z = 2", 2.0, steps=4)
TRAINING_SAMPLES = 20
CASES = (
    Case("z = 0.5", 0.5),
    Case("z = 1", 1.0),
    Case("z = 2", 2.0),
    Case("z = 1, drawn with q = 1/4", 1.0, rate=(1, 4)),
    Case("half the noise", 2.0, holds=False, mechanism="HalfTheNoise"),
    Case("each tensor clipped", 2.0, holds=False, mechanism="ClipsEachTensor"),
    Case("a learner twice", 2.0, holds=False, copies=2),
    Case("no noise", 2.0, holds=False, mechanism="NoNoise"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--releases", type=int, help="releases with the canary, and as many without (2000, or 20000 with --full)")
    parser.add_argument("--tail-releases", type=int, help="the same for delta files and trainings (200, or 2000 with --full)")
    parser.add_argument("--confidence", type=float, default=0.999, help="of each bound")


def run(options: argparse.Namespace) -> Report:
    releases = options.releases or (20_000 if options.full else 2_000)
    of_tails = options.tail_releases or (2_000 if options.full else 200)
    if min(releases, of_tails) < 2 or not 0.5 <= options.confidence < 1.0:
        raise SystemExit("--releases and --tail-releases must be at least 2, --confidence from 0.5 to below 1")
    with TemporaryDirectory(prefix="aivo-bench-") as folder:
        arguments = {"folder": folder, "releases": of_tails, "confidence": options.confidence}
        rows = [in_child("benchmarks.privacy_audit:through_files", arguments, threads=1).result]
    arguments = {"trainings": of_tails, "confidence": options.confidence}
    rows.append(in_child("benchmarks.privacy_audit:through_training", arguments, threads=1).result)
    rows += [
        in_child(
            "benchmarks.privacy_audit:in_memory",
            {"case": number, "releases": releases, "confidence": options.confidence},
            threads=1,
        ).result
        for number in range(len(CASES))
    ]
    wrong = [row["case"] for row in rows if not row["as_expected"]]
    table = Table(
        f"Lower bounds on eps at delta {DELTA:g} from a membership attack, confidence {options.confidence:g}",
        ("mechanism", "releases", "claimed eps", "exact eps", "by counts", "by shape", "counts' most", "verdict"),
        [
            (
                row["case"],
                row["releases"],
                row["claimed"],
                row["exact"],
                row["by_counts"],
                row["by_shape"],
                row["most"],
                row["verdict"],
            )
            for row in rows
        ],
    )
    note = (
        f"Not as expected: {', '.join(wrong)}."
        if wrong
        else "Every claim that is true was left standing, every false one was caught."
    )
    figures = {
        "delta": DELTA,
        "confidence": options.confidence,
        "tail_numbers": TAIL_NUMBERS,
        "rows": rows,
        "not_as_expected": wrong,
    }
    return Report(figures=figures, tables=[table], notes=[note], packages=("django", "scipy", "dp-accounting"))


# --- In child processes ---------------------------------------------------------------------------------------------------


def in_memory(case: int, releases: int, confidence: float) -> dict[str, Any]:
    """One case through the fold, vectors in memory."""
    from aivo_core.privacy_mechanisms import GaussianSumMechanism
    from benchmarks import privacy_attack

    chosen = CASES[case]
    own = chosen.mechanism == "GaussianSumMechanism"
    make = GaussianSumMechanism if own else getattr(privacy_attack, chosen.mechanism)
    release = privacy_attack.folded(make, dim=DIM, clip_norm=CLIP_NORM, noise_multiplier=chosen.z, expected_cohort=COHORT)
    found = privacy_attack.attack(
        release,
        dim=DIM,
        clip_norm=CLIP_NORM,
        expected_cohort=COHORT,
        delta=DELTA,
        releases=releases,
        confidence=confidence,
        copies=chosen.copies,
        rate=chosen.rate,
    )
    return judged(chosen, found.to_json())


def through_files(folder: str, releases: int, confidence: float) -> dict[str, Any]:
    """Delta files of the default network, folded as a round folds them."""
    installation.opened(folder)
    from aivo_core.network import NetworkSpec
    from aivo_core.privacy_mechanisms import GaussianSumMechanism
    from benchmarks import privacy_attack
    from federation import strategies
    from federation.rounds.cohort import DiscountedDelta
    from federation.rounds.folding import Member, fold_members
    from models_store import store

    spec = NetworkSpec()
    members: dict[bytes, Member] = {}

    def member_of(delta: Any) -> Member:
        """The member with this delta, its file written once."""
        key = delta[:8].tobytes()
        if key not in members:
            identity = UUID(int=len(members) + 1)
            file = store.write_delta(learner_id=f"audit-{identity.int}", session_id=str(identity), spec=spec, delta=delta)
            members[key] = Member(identity, identity, 1.0, (DiscountedDelta(store.DeltaFile(file.path, file.sha256), 1.0),))
        return members[key]

    def release(deltas: Sequence[Any]) -> Any:
        mechanism = GaussianSumMechanism(clip_norm=CLIP_NORM, noise_multiplier=FILES.z, expected_cohort=COHORT)
        cohort = [member_of(delta) for delta in deltas]
        return fold_members(cohort, strategy=strategies.get_fold("fedavg"), spec=spec, mechanism=mechanism).finish().vector

    found = privacy_attack.attack(
        release,
        dim=spec.tail_size,
        clip_norm=CLIP_NORM,
        expected_cohort=COHORT,
        delta=DELTA,
        releases=releases,
        confidence=confidence,
    )
    stored = len(list(Path(folder).glob("learners/*/deltas/*.safetensors")))
    return {**judged(FILES, found.to_json()), "delta_files": stored, "numbers_each": spec.tail_size}


def through_training(trainings: int, confidence: float) -> dict[str, Any]:
    """Private trainings of the default network's tail by the product's engine."""
    from aivo_core.engine.cohort import CohortEngine
    from aivo_core.engine.contract import LearnerTask, LocalTrainingConfig
    from aivo_core.network import NetworkSpec
    from benchmarks.privacy_sample_attack import Target, attack_training
    from benchmarks.synthetic import random_samples, random_weights

    spec = NetworkSpec()
    weights = random_weights(spec)
    config = LocalTrainingConfig(
        epochs=TRAINING.steps,
        batch_size=TRAINING_SAMPLES + 1,
        adaptation="tail",
        optimiser="sgd",
        dropout=False,
        proximal_mu=0.0,
        learning_rate=0.01,
        sample_clip_norm=CLIP_NORM,
        sample_noise_multiplier=TRAINING.z,
    )
    samples = random_samples(spec, samples=TRAINING_SAMPLES + 1, seed=1)
    engine = CohortEngine(threads=1)

    def train(task: LearnerTask) -> Any:
        result = next(engine.train(spec=spec, weights=weights, config=config, tasks=iter([task])))
        if result.tail is None:
            raise RuntimeError(result.error_message)
        return result.tail

    target = Target(spec, weights, spec.flatten_tail(weights), samples, config)
    found = attack_training(target, train, delta=DELTA, trainings=trainings, confidence=confidence)
    return {**judged(TRAINING, found.to_json()), "numbers_each": spec.tail_size, "backend": engine.backend}


def judged(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """The row: the bounds, what is claimed, and whether the verdict is what it has to be."""
    from benchmarks.privacy_attack import epsilon_of_distance
    from federation.privacy.accountant import epsilon

    num, den = case.rate
    claimed = epsilon(
        z=case.z, q_num=num, q_den=den, steps=case.steps, delta=DELTA, sampling="none" if num == den else "poisson"
    ).epsilon
    contradicted = found["epsilon"] > claimed
    return {
        "case": case.name,
        **{name: None if value is None else rounded(value) for name, value in found.items()},
        "claimed": rounded(claimed),
        "exact": rounded(epsilon_of_distance(case.steps**0.5 / case.z, DELTA)) if num == den else None,
        "holds": case.holds,
        "verdict": "contradicted" if contradicted else "not contradicted",
        "as_expected": contradicted != case.holds,
    }


BENCHMARK = Benchmark("privacy_audit", __doc__, run, add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
