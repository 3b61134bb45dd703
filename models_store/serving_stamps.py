"""One query that says everything which decides a learner's recommendation.

The answer's parts (networks, encoder states) are kept in memory under names of their content; this query brings the names.
What another process has written since (a withdrawal, a new interaction, a promotion, a new tail) is therefore seen by the very
next request, and a warm request needs nothing else from the database. The statement is made by the ORM once and then reused:
building it takes several times as long as running it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connections, router
from django.db.models import F, QuerySet, Subquery
from django.db.models.expressions import RawSQL
from django.db.models.fields.json import KeyTextTransform
from django.db.models.functions import Lower

from learners.models import LEARNER_ID_PATTERN, Learner
from models_store.models import MainModelVersion, VersionStatus

_IDS_PER_QUERY = 400


class ServingStamp(NamedTuple):
    """What is served to a learner now, in the database's own types where it is only compared.

    Attributes:
        learner, history_stamp: primary key and stamp of the learner's interactions.
        withdrawn_at: None unless withdrawn.
        model: primary key of the personalized model, None without one; the fields up to ``freeze_layers`` are its own.
        freeze_layers: JSON text, None for the base's own list.
        base_*: the version that the model is relative to. active_*: the active version; None where there is none.
    """

    learner: UUID
    learner_id: str
    history_stamp: UUID
    consent_training: bool
    withdrawn_at: object
    model: UUID | None
    backend: str
    status: str
    serving_choice: str
    blend: float
    number: int
    weights_path: str
    weights_sha256: str
    freeze_layers: str | None
    base_version: str | None
    base_path: str
    base_manifest: str
    base_encoder: str
    active_version: str | None
    active_path: str
    active_manifest: str
    active_encoder: str


def read_stamp(learner_id: str) -> ServingStamp | None:
    """The learner's stamp; None for an unknown learner. Upper and lower case do not matter."""
    found = read_stamps([learner_id])
    return found.get(learner_id.lower())


def read_stamps(learner_ids: Sequence[str]) -> dict[str, ServingStamp]:
    """Stamps by learner id in small letters; unknown learners are left out."""
    # Anything else may hold what a database refuses to look up.
    wanted = list(dict.fromkeys(text.lower() for text in learner_ids if re.match(LEARNER_ID_PATTERN, text)))
    found: dict[str, ServingStamp] = {}
    for start in range(0, len(wanted), _IDS_PER_QUERY):
        for stamp in _run(wanted[start : start + _IDS_PER_QUERY]):
            found[stamp.learner_id.lower()] = stamp
    return found


def _run(lowered_ids: Sequence[str]) -> Iterator[ServingStamp]:
    alias = router.db_for_read(Learner)
    connection = connections[alias]
    sql, parameters, places = _statement(alias, len(lowered_ids))
    values = list(parameters)
    for place, lowered in zip(places, lowered_ids, strict=True):
        values[place] = lowered
    with connection.cursor() as cursor:
        cursor.execute(sql, values)
        rows = cursor.fetchall()
    for row in rows:
        yield ServingStamp(_key(row[0]), row[1], _key(row[2]), bool(row[3]), row[4], _key(row[5]) if row[5] else None, *row[6:])


@lru_cache(maxsize=16)
def _statement(alias: str, count: int) -> tuple[str, tuple[Any, ...], tuple[int, ...]]:
    """SQL for ``count`` learner ids, its parameters, and at which of them the ids go."""
    stands_for = [f"\x00{index}" for index in range(count)]
    learners = Learner.objects.using(alias).annotate(lowered_id=Lower("learner_id")).order_by()
    chosen = learners.filter(lowered_id=stands_for[0]) if count == 1 else learners.filter(lowered_id__in=stands_for)
    sql, parameters = _columns(chosen).query.get_compiler(using=alias).as_sql()
    return sql, tuple(parameters), tuple(parameters.index(text) for text in stands_for)


def _columns(learners: QuerySet[Any]) -> QuerySet[Any]:
    """The columns of ``ServingStamp`` in its order."""
    own, base = "personalized_model__", "personalized_model__source_version__"
    # A literal: with a parameter SQLite prepares the statement anew for every call, to see whether the index of the active
    # version, which has a condition, can still be used.
    active = MainModelVersion.objects.filter(status=RawSQL(f"'{VersionStatus.ACTIVE.value}'", ())).order_by()  # noqa: S611
    return learners.values_list(
        "pk",
        "learner_id",
        "history_stamp",
        "consent_training",
        "withdrawn_at",
        own + "pk",
        own + "backend",
        own + "status",
        own + "serving_choice",
        own + "blend",
        own + "version",
        own + "weights_path",
        own + "weights_sha256",
        KeyTextTransform("freeze_layers", own + "metadata"),
        *(F(base + name) for name in _VERSION),
        *(Subquery(active.values(name)[:1]) for name in _VERSION),
    )


_VERSION = ("version", "model_path", "manifest_sha256", "encoder_sha256")


def _key(raw: UUID | str) -> UUID:
    return raw if isinstance(raw, UUID) else UUID(raw)
