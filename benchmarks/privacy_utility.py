"""What learner-level privacy costs in quality: one round's real deltas, clipped and noised, judged by evaluation learners.

    python -m benchmarks.privacy_utility [--full] [--learners 100] [--installation FOLDER] [--json]

The deltas are the contributions of one round of a whole installation. For each ε of one round (q = 1, δ as the product sets it
for a population of that size), cohort, clipping norm and server learning rate, the product's own clipping and mechanism make an
update of a cohort drawn from these learners, and the gate's own comparison says how the losses change for the learners outside.

A cohort larger than there are learners is *extrapolated*: its clipped mean is taken to be that of all learners here, and only
the noise is that of the larger cohort. The best clipping norm and rate have the lowest mean total over the first half of
the draws; what is reported is the second half. Both are judged by the same learners, which flatters every row a little.

``--full`` builds the installation of the data set assist17 from ``../shared/data`` through the product's commands, as operators
would; without it learners are simulated. ``--installation`` takes one that holds a round already (its database is migrated).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import installation
from benchmarks.harness import ROOT, Benchmark, Report, Table, in_child, rounded, usable_cores

DATA = ROOT.parent / "shared" / "data"
EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0, None)
"""Of one round; None is no noise, with the same clipping."""

LARGER_COHORTS = (2_000, 10_000)
NORMS = (0.5, 1.0, 2.0)
"""Clipping norms tried, in medians of the deltas' norms."""

RATES = (1.0, 2.0, 4.0)
"""Server learning rates tried."""

NOISE_NORMS = (0.5, 1.0, 2.0, 4.0)
"""L2 norms of noise that is added alone: a control, and what a norm costs whatever z, C and the cohort make it."""

METRICS = ("total", "content", "path", "score")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learners", type=int, default=100, help="simulated learners of the round, without --full")
    parser.add_argument("--installation", help="folder with db.sqlite3, main and learners of an installation that ran a round")


def run(options: argparse.Namespace) -> Report:
    with _world(options) as folder:
        found = in_child("benchmarks.privacy_utility:measured", {"folder": folder, "draws": options.repeats}, threads=1).result
    headers = (
        "eps of a round",
        "cohort",
        "z",
        "best C",
        "best rate",
        "noise/update",
        *METRICS,
        "least total",
        "most total",
        "passes",
    )
    rows = [
        (
            "none" if row["epsilon"] is None else row["epsilon"],
            f"{row['cohort']:,}{'*' if row['extrapolated'] else ''}",
            row["z"],
            row["clip_norm"],
            row["server_learning_rate"],
            row["noise_over_update"],
            *(f"{row['change'][name]:+.5f}" for name in METRICS),
            *(f"{value:+.5f}" for value in row["total_range"]),
            f"{row['passed']}/{row['draws']}",
        )
        for row in found["best"]
    ]
    plain = ", ".join(f"{made['change']['total']:+.5f} at rate {rate}" for rate, made in found["plain_mean"].items())
    note = (
        f"{found['learners']} deltas of {found['numbers']} numbers; norms: median {found['norms']['median']}, 90 % below "
        f"{found['norms']['p90']}; norm of their mean {found['norms']['of_mean']}. Change of the total with their plain mean: "
        f"{plain}. Judged by {found['evaluation_learners']} learners, {found['draws']} draws each. "
        "* extrapolated: the mean delta of the learners here, the noise of so many."
    )
    alone = Table(
        "Change of loss by noise alone",
        ("norm of the noise", *METRICS),
        [(made["norm"], *(f"{made['change'][name]:+.5f}" for name in METRICS)) for made in found["noise_alone"]],
    )
    title = "Change of loss by the candidate, mean over draws (negative is better)"
    return Report(figures=found, tables=[Table(title, headers, rows), alone], notes=[note], packages=("django", "dp-accounting"))


@contextmanager
def _world(options: argparse.Namespace) -> Iterator[str]:
    if options.installation:
        yield options.installation
        return
    if not options.full:
        size = installation.Size(federated=options.learners)
        with installation.temporary(size) as folder:
            in_child("benchmarks.privacy_utility:one_round", {"folder": folder})
            yield folder
        return
    if not DATA.exists():
        raise SystemExit("--full needs the data set in ../shared/data, which is not here; without --full learners are simulated")
    with TemporaryDirectory(prefix="aivo-bench-") as folder:
        in_child("benchmarks.privacy_utility:fill_from_data", {"folder": folder, "data": str(DATA)}, threads=usable_cores())
        in_child("benchmarks.privacy_utility:one_round", {"folder": folder})
        yield folder


# --- In child processes ---------------------------------------------------------------------------------------------------


def fill_from_data(folder: str, data: str) -> None:
    """Import the data set, prepare, train the main version and clone it, by the product's commands."""
    installation.opened(folder)
    from django.core.management import call_command

    consent = ("--consent", "training,contribution", "--authority", "study")
    for file, pool in (("assist17_main", "curriculum"), ("assist17_federated", "federated")):
        call_command("import_interactions", str(Path(data) / f"{file}.csv.gz"), "--pool", pool, *consent, "--json")
    for command in ("prepare_curriculum_data", "train_main_model", "clone_learner_models"):
        call_command(command, "--json")


def one_round(folder: str) -> dict[str, Any]:
    """Each copy trained once, then a round without privacy, whose contributions stay."""
    installation.opened(folder)
    from aivo_site.jobs.services import run_inline
    from federation.rounds import service

    run_inline(kind="train_learner_models", params={})
    return {"state": service.aggregate(with_rebase=False)["state"]}


def measured(folder: str, draws: int) -> dict[str, Any]:
    """All figures, from the contributions of the installation's first round."""
    installation.opened(folder)
    from models_store import store

    round_, deltas = _contributions()
    base = store.load_version(round_.base_version)
    judge = Judge(base)
    norms = np.sqrt(np.sum(np.square(deltas, dtype=np.float64), axis=1))
    median = float(np.median(norms))
    everyone = len(deltas)
    cohorts = sorted({min(size, everyone) for size in (50, 200, everyone)}) + [n for n in LARGER_COHORTS if n > everyone]
    best = []
    for epsilon in EPSILONS:
        for cohort in cohorts:
            cells = [
                _cell(deltas, judge, epsilon=epsilon, cohort=cohort, clip_norm=share * median, draws=draws) for share in NORMS
            ]
            best.append(min((one for cell in cells for one in cell), key=lambda one: one["chosen_by"]))
    mean = deltas.mean(axis=0, dtype=np.float64)
    plain = {str(rate): judge.change(mean.astype(np.float32), rate) for rate in RATES}
    return {
        "learners": everyone,
        "numbers": int(deltas.shape[1]),
        "norms": {
            "median": rounded(median),
            "p90": rounded(float(np.quantile(norms, 0.9))),
            "largest": rounded(float(norms.max())),
            "of_mean": rounded(float(np.sqrt(np.sum(np.square(mean))))),
        },
        "evaluation_learners": len(judge.current),
        "draws": draws,
        "plain_mean": {
            rate: {"change": {name: rounded(found[name]) for name in METRICS}, "passed": bool(found["passed"])}
            for rate, found in plain.items()
        },
        "noise_alone": [_noise_alone(judge, norm=norm, numbers=deltas.shape[1], draws=draws) for norm in NOISE_NORMS],
        "best": best,
    }


def _contributions() -> tuple[Any, Any]:
    """The first round that accepted contributions, and these as (n, d) float32."""
    from federation.models import AggregationRound
    from federation.policies import RoundPolicy
    from federation.rounds import cohort
    from federation.rounds.lineage import lineage_of
    from models_store.delta_files import DeltaReader

    for round_ in AggregationRound.objects.order_by("sequence"):
        keys = list(cohort.accepted_rows(round_).values_list("pk", flat=True))
        if keys:
            break
    else:
        raise SystemExit("the installation holds no round with accepted contributions")
    policy = RoundPolicy.from_json(round_.policy)
    files = cohort.delta_files(keys, behind=lineage_of(round_.base_version), exponent=policy.staleness_exponent)
    from aivo_core.network import NetworkSpec

    reader = DeltaReader(NetworkSpec.from_json(round_.base_version.architecture))
    return round_, np.stack([np.array(cohort.compose(files[key], reader.read)) for key in keys])


class Judge:
    """The gate's comparison with samples and trunk activations kept: one call costs the tail's layers alone.

    Attributes:
        current: losses of the base version.
    """

    def __init__(self, base: Any) -> None:
        from aivo_core.samples import TRAIN_SHARE
        from federation.rounds.evidence import gate_learners
        from models_store.forecasting import trunk_activations
        from models_store.learning_data import learner_samples

        self._base = base
        self._learners = []
        for learner, samples in learner_samples(learners=gate_learners(), loaded=base):
            _earlier, later = samples.split_at(TRAIN_SHARE)
            if len(later):
                self._learners.append((str(learner.subject_key), trunk_activations(base, later), later))
        self.current = self._losses(base.tail)

    def _losses(self, tail: Any) -> list[Any]:
        from models_store.evaluation import learner_losses
        from models_store.forecasting import forecast_tail

        mix = self._base.content_mix
        return [learner_losses(key, forecast_tail(self._base, tail, made), later, mix) for key, made, later in self._learners]

    def change(self, update: Any, rate: float) -> dict[str, Any]:
        """Mean change of each metric by ``rate`` times ``update``, and whether a gate with the product's tolerances passes it."""
        from federation.rounds.candidate import candidate_tail
        from federation.rounds.gate import GateRules, decide

        losses = self._losses(candidate_tail(self._base, update, rate))
        decision = decide(self.current, losses, rules=GateRules({}, minimum_learners=1), groups={})
        if "changes" not in decision.report:
            raise RuntimeError(f"the candidate could not be measured: {decision.reason}")
        return {**{name: decision.report["changes"][name]["mean"] for name in METRICS}, "passed": decision.passed}


def _cell(deltas: Any, judge: Judge, *, epsilon: float | None, cohort: int, clip_norm: float, draws: int) -> list[dict[str, Any]]:
    """One ε, cohort and clipping norm, with each server learning rate; ``draws`` cohorts and noises, all seeded."""
    z = None if epsilon is None else _noise_for(epsilon, cohort)
    made = [_updates(deltas, z=z, cohort=cohort, clip_norm=clip_norm, draw=draw) for draw in range(draws)]
    sizes = [float(np.linalg.norm(quiet.astype(np.float64))) for _update, quiet in made]
    noises = [float(np.linalg.norm(update.astype(np.float64) - quiet)) for update, quiet in made]
    cells = []
    for rate in RATES:
        changes = [judge.change(update, rate) for update, _quiet in made]
        first, second = changes[: (draws + 1) // 2], changes[draws // 2 :]
        totals = [change["total"] for change in second]
        cells.append(
            {
                "epsilon": epsilon,
                "cohort": cohort,
                "extrapolated": cohort > len(deltas),
                "z": None if z is None else rounded(z),
                "clip_norm": rounded(clip_norm),
                "server_learning_rate": rate,
                "noise_over_update": rounded(float(np.mean(noises) / np.mean(sizes)), 3),
                "chosen_by": float(np.mean([change["total"] for change in first])),
                "change": {name: rounded(float(np.mean([change[name] for change in second]))) for name in METRICS},
                "total_range": [rounded(min(totals)), rounded(max(totals))],
                "passed": sum(change["passed"] for change in second),
                "draws": len(second),
            }
        )
    return cells


def _noise_alone(judge: Judge, *, norm: float, numbers: int, draws: int) -> dict[str, Any]:
    """What noise of an expected L2 norm does to the losses without any update, mean over draws."""
    rngs = [np.random.default_rng([draw, 1]) for draw in range(draws)]
    changes = [judge.change((rng.normal(size=numbers) * norm / np.sqrt(numbers)).astype(np.float32), 1.0) for rng in rngs]
    return {"norm": norm, "change": {name: rounded(float(np.mean([change[name] for change in changes]))) for name in METRICS}}


def _updates(deltas: Any, *, z: float | None, cohort: int, clip_norm: float, draw: int) -> tuple[Any, Any]:
    """The released update and the same without noise, (d,) float32 both."""
    from aivo_core.privacy import clip
    from aivo_core.privacy_mechanisms import GaussianSumMechanism

    rng = np.random.default_rng([draw, cohort])
    members: Sequence[int] = sorted(rng.choice(len(deltas), min(cohort, len(deltas)), replace=False).tolist())
    total = np.zeros(deltas.shape[1])
    for member in members:
        total += clip(deltas[member], clip_norm)
    total *= cohort / len(members)  # 1 but for extrapolated cohorts
    quiet = (total / cohort).astype(np.float32)
    if z is None:
        return quiet, quiet
    # Seeded, so that the table can be had again; a round never is.
    mechanism = GaussianSumMechanism(clip_norm=clip_norm, noise_multiplier=z, expected_cohort=float(cohort), rng=rng)
    return (mechanism.add_noise(total) / mechanism.denominator).astype(np.float32), quiet


def _noise_for(epsilon: float, population: int) -> float:
    from federation.privacy.calibration import smallest_noise
    from federation.privacy.release import default_delta

    return smallest_noise(epsilon=epsilon, delta=default_delta(population), q_num=1, q_den=1, steps=1).z


BENCHMARK = Benchmark("privacy_utility", __doc__, run, add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
