"""The encoder: raw events to rows in bulk, a few new events on top of a state, a state read back.

    python -m benchmarks.encoding [--full] [--json]

An encoder is fitted on simulated learners, then other simulated learners are replayed: every event but a learner's first
gives a sample of two rows (first and second pass) with its labels. ``rows`` counts samples' events, not both rows. Encoding
runs in one process without Django; the database's part (reading a history, storing a state) is measured on SQLite beside it.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from aivo_core.encoding.encoder import Encoder
from aivo_core.encoding.events import Event
from aivo_core.encoding.fit import fit_encoder
from aivo_core.encoding.state import EncoderState
from benchmarks import installation
from benchmarks.harness import Benchmark, Report, Table, Timing, in_child, measure, rounded

NEEDED_ROWS_PER_SECOND = 50_000
FITTED_LEARNERS = 60
HISTORIES = (100, 1_000, 10_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learners", type=int, help="learners replayed in bulk (200, or 1000 with --full)")


def run(options: argparse.Namespace) -> Report:
    learners = options.learners or (1000 if options.full else 200)
    arguments = {"learners": learners, "repeats": options.repeats}
    pure = in_child("benchmarks.encoding:encode", arguments, threads=1)
    with installation.temporary(
        installation.Size(federated=learners, curriculum=20, evaluation=20, epochs=1), clones=False
    ) as folder:
        stored = in_child("benchmarks.encoding:through_the_database", {"folder": folder, "repeats": options.repeats}, threads=1)
    figures: dict[str, Any] = {
        "learners": learners,
        "events_each": installation.EVENTS,
        "needed_rows_per_second": NEEDED_ROWS_PER_SECOND,
        **pure.result,
        "database": stored.result,
        "peak_rss_mb": pure.peak_rss_mb,
    }
    return Report(figures=figures, tables=_tables(figures), packages=("django",))


def encode(learners: int, repeats: int) -> dict[str, Any]:
    """Figures of the encoder alone; in a child process."""
    histories = _histories(FITTED_LEARNERS + learners)
    encoder = fit_encoder([(str(number), events) for number, events in enumerate(histories[:FITTED_LEARNERS])]).encoder
    replayed = histories[FITTED_LEARNERS:]
    events = sum(map(len, replayed))
    bulk = measure(lambda: [encoder.encode(history) for history in replayed], repeats=repeats)
    everything = [event for history in replayed for event in history]
    return {
        "bulk": {"events": events, **bulk.rates(events), "medians": bulk.figures()},
        "histories": {str(length): _one_history(encoder, everything, length, repeats) for length in HISTORIES},
    }


def through_the_database(folder: str, repeats: int) -> dict[str, Any]:
    """Stored interactions to samples in bulk, and a learner's state cold; in a child process."""
    installation.opened(folder)
    from learners.models import EncoderState as StateRow
    from learners.models import Learner, Pool
    from models_store.learner_states import current_states
    from models_store.learning_data import learner_samples
    from models_store.version_files import load_version
    from models_store.versions import active_version

    loaded = load_version(active_version())
    learners = Learner.objects.filter(pool=Pool.FEDERATED)
    stamps = dict(learners.values_list("pk", "history_stamp"))
    rows = 0

    def read_and_encode() -> None:
        nonlocal rows
        rows = sum(samples.events for _learner, samples in learner_samples(learners=learners, loaded=loaded))

    bulk = measure(read_and_encode, repeats=repeats)
    replay = measure(
        lambda: current_states(stamps, loaded.encoder), repeats=repeats, warmups=0, before=StateRow.objects.all().delete
    )
    stored = measure(lambda: current_states(stamps, loaded.encoder), repeats=repeats)
    return {
        "bulk": {"events": rows, **bulk.rates(rows), "medians": bulk.figures()},
        "state_replayed_and_stored_us": _microseconds(replay, len(stamps)),
        "state_read_us": _microseconds(stored, len(stamps)),
    }


def _one_history(encoder: Encoder, events: list[Event], length: int, repeats: int) -> dict[str, float]:
    """A learner with ``length`` events: all replayed, one event more on top of the state, the state as JSON and back."""
    history = (events * (1 + length // len(events)))[: length + 1]
    state = encoder.encode(history[:length])[1]
    text = json.dumps(state.to_json())
    return {
        "replay_ms": rounded(1e3 * measure(lambda: encoder.encode(history[:length]), repeats=repeats).wall),
        "one_more_event_us": _microseconds(measure(lambda: encoder.encode(history[length:], state), repeats=10 * repeats)),
        "prediction_us": _microseconds(measure(lambda: encoder.prediction(state), repeats=10 * repeats)),
        "state_from_json_us": _microseconds(measure(lambda: EncoderState.from_json(json.loads(text)), repeats=10 * repeats)),
        "state_bytes": len(text),
    }


def _microseconds(timing: Timing, count: int = 1) -> float:
    return rounded(1e6 * timing.wall / count)


def _histories(count: int) -> list[list[Event]]:
    from learners.simulator import Simulator

    simulator = Simulator(installation.SEED, learners=count, prefix="bench")
    return [_history(simulator.learner(index)) for index in range(count)]


def _history(learner: Any) -> list[Event]:
    rows = (learner.answer(learner.next_task()) for _ in range(installation.EVENTS))
    return [
        Event(
            category=row["category"],
            item=row["item_id"],
            subject=row["subject"],
            score=float(row["score"]),
            response_ms=float(row["response_ms"]),
        )
        for row in rows
    ]


def _tables(figures: dict[str, Any]) -> list[Table]:
    bulk, database = figures["bulk"], figures["database"]
    speed = [
        (name, found["events"], found["per_second"], found["per_cpu_second"], found["per_second"] / NEEDED_ROWS_PER_SECOND)
        for name, found in (("events in memory to samples", bulk), ("stored interactions to samples", database["bulk"]))
    ]
    headers = ("events", "replay ms", "one more event us", "prediction us", "state from JSON us", "state bytes")
    single = [(length, *found.values()) for length, found in figures["histories"].items()]
    states = [
        ("replayed from the history and stored", database["state_replayed_and_stored_us"]),
        ("current: read from its row", database["state_read_us"]),
    ]
    return [
        Table("Replaying in bulk", ("way", "events", "rows/s", "rows/CPU s", "times 50,000/s"), speed),
        Table("One learner", headers, single),
        Table("A learner's state through the database", ("way", "us per learner"), states),
    ]


BENCHMARK = Benchmark(name="encoding", description=__doc__, run=run, add_arguments=add_arguments)

if __name__ == "__main__":
    BENCHMARK.main()
