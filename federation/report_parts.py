"""Training reports as the results of shards, and put together again: exactly, and small enough for a row.

The losses of 64 learners take some 22 kB: eight float64 numbers for each learner and model, in base 64.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from federation.serving_decision import ServedEvaluation
from federation.training_report import NOTES, Control, Note, TrainingReport
from models_store.evaluation import LearnerLosses

_FIGURES = tuple(f.name for f in fields(LearnerLosses) if f.name != "key")
_MODELS = ("main", "served", "personal")


def part_of(report: TrainingReport) -> dict[str, Any]:
    """A report as a JSON object that ``merged`` takes, without its times but for the engine's."""
    position = {entry.main.key: number for number, entry in enumerate(report.evaluations)}
    return {
        "engine": report.engine,
        "backend": report.backend,
        "trained": report.trained,
        "skipped": dict(report.skipped),
        "failed": dict(report.failed),
        "choices": dict(report.choices),
        "training_seconds": report.training_seconds,
        "notes": [asdict(note) for note in report.notes],
        "learners": [entry.main.key for entry in report.evaluations],
        "losses": {name: _packed([getattr(entry, name) for entry in report.evaluations]) for name in _MODELS},
        "control_of": [position[entry.main.key] for entry in report.controls],
        "control": _packed([entry.other for entry in report.controls]),
    }


def merged(parts: Sequence[Mapping[str, Any]], *, engine: str) -> TrainingReport:
    """The report of all parts, in their order; ``seconds`` is left at 0.

    Args:
        engine: the engine's name where there is no part.
    """
    report = TrainingReport(engine=parts[0]["engine"] if parts else engine)
    for part in parts:
        for backend in filter(None, part["backend"].split(", ")):
            report.computed_by(backend)
        report.trained += part["trained"]
        report.skipped += Counter(part["skipped"])
        report.failed += Counter(part["failed"])
        report.choices += Counter(part["choices"])
        report.training_seconds += part["training_seconds"]
        report.notes = [*report.notes, *(Note(**note) for note in part["notes"])][:NOTES]
        keys = part["learners"]
        columns = [_unpacked(part["losses"][name], keys) for name in _MODELS]
        evaluations = [ServedEvaluation(*losses) for losses in zip(*columns, strict=True)]
        of = part["control_of"]
        others = _unpacked(part["control"], [keys[number] for number in of])
        report.evaluations += evaluations
        report.controls += [Control(evaluations[number].main, other) for number, other in zip(of, others, strict=True)]
    return report


def _packed(losses: Sequence[LearnerLosses]) -> str:
    table = np.array([[getattr(entry, name) for name in _FIGURES] for entry in losses], dtype="<f8")
    return base64.b64encode(table.tobytes()).decode("ascii")


def _unpacked(text: str, keys: Sequence[str]) -> list[LearnerLosses]:
    table = np.frombuffer(base64.b64decode(text), dtype="<f8").reshape(len(keys), len(_FIGURES)).tolist()
    return [
        LearnerLosses(key=key, **{**dict(zip(_FIGURES, row, strict=True)), "samples": int(row[_FIGURES.index("samples")])})
        for key, row in zip(keys, table, strict=True)
    ]
