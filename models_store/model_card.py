"""MODEL_CARD.md: what a version is for, what it learnt from, what its figures mean and where it ends, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aivo_core.network import NetworkSpec

INTENDED_USE = """\
For recommending a learner's next step: which category the curriculum is likely to bring next, at which difficulty level
the learner would get a task right with a wanted chance, and what kind of step comes next. It is a help for teachers and
learning apps. It is not made to grade, to rank learners, to decide on admission or support, or to diagnose anything."""

MEANING = """\
- *Content* forecasts the next category that the curriculum brings. It says what usually comes, not what would be best.
  Top-1 and top-5 are the shares of events whose category was the first, or among the first five; log loss punishes
  confident errors (smaller is better, 0 is perfect).
- *Difficulty* is a success curve: for each level 1 to 9 the chance that the learner gets a task of that level right at the
  first attempt. AUC is the chance that a right answer got a higher forecast than a wrong one; Brier is the mean squared
  error; the calibration gap is how far forecast and observed success lie apart over ten equal groups, on average and in the
  worst one.
- *Path* forecasts the kind of the next step (repeat, same category, review, new; easier, same, harder)."""

LIMITS = """\
- The figures hold for learners like those it was evaluated on. Other schools, subjects or ages can differ.
- Categories that were rare or unknown in training share one slot and are forecast less well.
- With little history the forecasts lean on what is common; see the figures by length of history.
- The levels are relative to the tasks of the training data: level 5 is the middle of these, not of a curriculum standard.
- The encoder's tables hold counts over at least three learners each and carry no name or learner id. The first version and
  its tables are not protected by differential privacy."""


@dataclass(frozen=True)
class CardContent:
    """What a card says beside the fixed texts.

    Attributes:
        origin: one sentence: how the version was made.
        data: lines on what it was made and evaluated with; counts, never names.
        metrics, baselines: as ``evaluation.main_metrics`` and ``baselines.Baselines.evaluate`` give them.
        notes: further lines for the limits.
    """

    version: str
    origin: str
    spec: NetworkSpec
    data: Sequence[str]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    baselines: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def model_card(content: CardContent) -> str:
    """The card as Markdown."""
    limits = "\n".join([LIMITS, *(f"- {note}" for note in content.notes)])
    data = "\n".join(f"- {line}" for line in content.data)
    return "\n\n".join(
        [
            f"# {content.version}",
            content.origin,
            f"## Intended use\n\n{INTENDED_USE}",
            f"## Network\n\n{_network(content.spec)}",
            f"## Data\n\n{data}",
            f"## Figures\n\n{_table(content)}\n\n{MEANING}",
            f"## Limits\n\n{limits}\n",
        ]
    )


def figure_rows(metrics: Mapping[str, Any], baselines: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(head, model, figures) lines, the model first and each baseline below it, per head."""
    rows = []
    for head, own in (
        ("content", ("content", "content_mixed")),
        ("difficulty", ("difficulty", "difficulty_first")),
        ("path", ("path",)),
    ):
        names = {"content": "this model", "content_mixed": "this model, mixed with the encoder's forecast"}
        names |= {"difficulty": "this model", "difficulty_first": "this model, category unknown", "path": "this model"}
        rows += [(head, names[key], figures_text(metrics[key])) for key in own if key in metrics]
        rows += [(head, name.replace("_", " "), figures_text(heads[head])) for name, heads in baselines.items() if head in heads]
    return rows


def figures_text(figures: Mapping[str, Any]) -> str:
    """The plain numbers of one head in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items() if isinstance(value, float))


def _network(spec: NetworkSpec) -> str:
    hidden = ", ".join(str(units) for units in spec.hidden_layers)
    heads = ", ".join(f"{head.name} ({head.units})" for head in spec.heads)
    return (
        f"{spec.input_dim} inputs, hidden layers of {hidden} units, heads {heads}: {spec.parameter_count:,} numbers. "
        f"The first {spec.frozen_blocks} blocks are the trunk, shared by all clones; the other {spec.tail_size:,} numbers are "
        "the tail that a learner's own copy adapts."
    )


def _table(content: CardContent) -> str:
    rows = figure_rows(content.metrics, content.baselines)
    if not rows:
        return "None were measured for this version alone; see its lineage."
    lines = [f"| {head} | {name} | {figures} |" for head, name, figures in rows]
    return "\n".join(["| head | model | figures |", "|---|---|---|", *lines])
