"""Tables of the local training benchmark from its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import Table, ratio

_TITLES = {
    "first_pass": "First-pass rows, cross entropy on three heads",
    "product": "The product's loss, both passes",
}
_Key = tuple[str, int, bool]


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """One per objective, then growth and start-up where they were measured."""
    found = [_engines(objective, figures["settings"], limit) for objective, limit in figures["gemm_limit"].items()]
    if figures["growth"]:
        headers = ("learners", "threads", "learners/s", "learners/CPU s", "peak MB")
        rows = [tuple(row.values()) for row in figures["growth"]]
        found.append(Table("Growth, engine cohort, the product's loss", headers, rows))
    if figures["startup"]:
        starts = [(name, run["backend"], run["startup_s"], run["peak_rss_mb"]) for name, run in figures["startup"].items()]
        found.append(Table("From nothing to the first delta", ("start", "backend", "seconds", "peak MB"), starts))
    return found


def _engines(objective: str, settings: Sequence[Mapping[str, Any]], limit: Mapping[str, Any]) -> Table:
    naive: dict[_Key, float] = {_key(row): row["learners_per_second"] for row in settings if row["engine"] == "naive_keras"}
    rows: list[tuple[Any, ...]] = [_engine_row(row, naive.get(_key(row))) for row in settings if row["objective"] == objective]
    rows.append(("matrix products alone", "-", 1, None, limit["learners_per_cpu_second"], "100 %", None, None))
    headers = ("engine", "dropout", "threads", "learners/s", "learners/CPU s", "of GEMM limit", "peak MB", "times naive")
    return Table(_TITLES[objective], headers, rows)


def _engine_row(row: Mapping[str, Any], naive: float | None) -> tuple[Any, ...]:
    return (
        row["engine"],
        "on" if row["dropout"] else "off",
        row["threads"],
        row["learners_per_second"],
        row["learners_per_cpu_second"],
        f"{100 * row['gemm_limit_share']:.1f} %",
        row["peak_rss_mb"],
        ratio(row["learners_per_second"], naive) if naive else None,
    )


def _key(row: Mapping[str, Any]) -> _Key:
    return row["objective"], row["threads"], row["dropout"]
