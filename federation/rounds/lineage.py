"""Which versions share a trunk: only between these is a difference of tails meaningful."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from models_store.models import MainModelVersion, VersionOrigin


def lineage_of(version: MainModelVersion) -> Mapping[UUID, int]:
    """Versions that ``version`` grew from by rounds, itself included, with how many versions behind each is.

    The chain ends at the first version that no round made: a training run draws a new trunk, so that tails of versions
    before it have nothing to do with this one.
    """
    behind: dict[UUID, int] = {}
    current: MainModelVersion | None = version
    while current is not None and current.id not in behind:
        behind[current.id] = len(behind)
        current = current.parent if current.origin == VersionOrigin.FEDERATED else None
    return behind


def root_of(version: MainModelVersion) -> UUID:
    """The trained or imported version whose trunk ``version`` has."""
    return list(lineage_of(version))[-1]
