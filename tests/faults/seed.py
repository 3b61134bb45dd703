"""Fills an empty installation through its own commands; run in the installation's environment, as one process.

python -m tests.faults.seed FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import django

POOLS = {"curriculum": (14, 40), "evaluation": (40, 60), "federated": (8, 60)}
"""Learners and mean events of each pool."""


def main(folder: Path) -> None:
    django.setup()
    from django.core.management import call_command

    from federation.policies import default_policy

    call_command("migrate", verbosity=0)
    for seed, (pool, (learners, events)) in enumerate(POOLS.items(), start=1):
        file = str(folder / f"{pool}.csv")
        call_command(
            "simulate_learners", "--learners", str(learners), "--events", str(events), "--seed", str(seed),
            "--prefix", pool[:3], "--out", file,
        )  # fmt: skip
        call_command(
            "import_interactions", file, "--pool", pool, "--consent", "training,contribution", "--authority", "simulated"
        )
    policy = default_policy()
    # The reference engine and many small steps: a learner's training takes long enough to be interrupted, in a process of its
    # own, and the tests stay quick.
    policy.engine = "keras"
    policy.min_samples, policy.local_epochs, policy.batch_size, policy.bias_epochs = 10, 20, 8, 1
    policy.save()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
