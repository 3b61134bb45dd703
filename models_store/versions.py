"""Rows of main model versions: reserved, published, made active, found again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Max
from django.utils import timezone
from django.utils.translation import gettext as _

from aivo_site.audit.services import record
from models_store.errors import NoMainModel, UnknownVersion, VersionConflict
from models_store.files import MAIN_MODELS, name_below_root
from models_store.models import MainModelVersion, VersionOrigin, VersionStatus
from models_store.version_files import VersionFiles, active_pointer, read_active_pointer, write_active_pointer

VERSION_PREFIX = "aivo-main-v"
CAN_BECOME_ACTIVE = (VersionStatus.CANDIDATE, VersionStatus.ARCHIVED, VersionStatus.REJECTED)
"""A rejected version may still be promoted by a person with a reason; a deprecated or unfinished one never."""

PUBLISHED_AS = (VersionStatus.CANDIDATE, VersionStatus.REJECTED, VersionStatus.ARCHIVED)
RESERVE_TRIES = 20


def active_version() -> MainModelVersion:
    """The active version.

    Raises:
        NoMainModel: there is none.
    """
    row = MainModelVersion.objects.filter(status=VersionStatus.ACTIVE).first()
    if row is None:
        raise NoMainModel(_("There is no active main model version: train one with train_main_model."))
    return row


def reserve_version(
    *,
    origin: VersionOrigin,
    parent: MainModelVersion | None = None,
    training_fingerprint: str | None = None,
    architecture: Mapping[str, Any] | None = None,
    encoder_sha256: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> MainModelVersion:
    """A new row in status TRAINING with the next number; with a fingerprint that a row has already, that row.

    Raises:
        VersionConflict: other processes took every number that was tried.
    """
    for _attempt in range(RESERVE_TRIES):
        if training_fingerprint:
            existing = MainModelVersion.objects.filter(training_fingerprint=training_fingerprint).first()
            if existing is not None:
                return existing
        sequence = next_sequence()
        try:
            with transaction.atomic():
                return MainModelVersion.objects.create(
                    version=f"{VERSION_PREFIX}{sequence}",
                    sequence=sequence,
                    parent=parent,
                    origin=origin,
                    training_fingerprint=training_fingerprint,
                    architecture=dict(architecture or {}),
                    encoder_sha256=encoder_sha256,
                    metadata=dict(metadata or {}),
                )
        except IntegrityError:
            continue  # another process took the number, or made the row of this fingerprint
    raise VersionConflict(_("No version number could be reserved; try again."))


def next_sequence() -> int:
    """The number after the highest one."""
    highest: int | None = MainModelVersion.objects.aggregate(highest=Max("sequence"))["highest"]
    return (highest or 0) + 1


def publish(
    *,
    row: MainModelVersion,
    files: VersionFiles,
    status: VersionStatus = VersionStatus.CANDIDATE,
    content_mix: float,
    architecture: Mapping[str, Any] | None = None,
    training_metrics: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Point a reserved row to its complete files; ``row`` is refreshed.

    Args:
        status: CANDIDATE, REJECTED or ARCHIVED; ``activate`` makes it ACTIVE.
        metadata: added to what the row has.

    Raises:
        VersionConflict: the row is no longer in status TRAINING.
    """
    if status not in PUBLISHED_AS:
        raise VersionConflict(_("A version is published as %(allowed)s.") % {"allowed": ", ".join(PUBLISHED_AS)})
    changed = MainModelVersion.objects.filter(pk=row.pk, status=VersionStatus.TRAINING).update(
        status=status,
        model_path=files.model_path,
        manifest_sha256=files.manifest_sha256,
        encoder_sha256=files.encoder_sha256,
        content_mix=content_mix,
        architecture=dict(architecture) if architecture is not None else row.architecture,
        training_metrics=dict(training_metrics or {}),
        metadata={**row.metadata, **(metadata or {})},
        updated_at=timezone.now(),
    )
    if changed != 1:
        raise VersionConflict(_("Version %(version)s has been finished by another process.") % {"version": row.version})
    row.refresh_from_db()


def set_status(*, row: MainModelVersion, status: VersionStatus, allowed: tuple[VersionStatus, ...]) -> None:
    """Move a row to ``status`` if it is in one of ``allowed``; never to or from ACTIVE.

    Raises:
        VersionConflict: it is in another.
    """
    if VersionStatus.ACTIVE in (status, *allowed):
        raise VersionConflict(_("Only activate moves the ACTIVE status."))
    changed = MainModelVersion.objects.filter(pk=row.pk, status__in=allowed).update(status=status, updated_at=timezone.now())
    row.refresh_from_db()
    if changed != 1:
        raise VersionConflict(_not_possible(row, allowed))


def activate(*, row: MainModelVersion, actor: str, reason: str, expected_active: MainModelVersion | None = None) -> None:
    """Make ``row`` the active version, inside the caller's transaction; the one that was active becomes ARCHIVED.

    ``ACTIVE.json`` follows after the commit.

    Args:
        actor: user name, or the command or schedule that acts.
        reason: why, for the audit log.
        expected_active: the version that must be active until now; with None whichever is.

    Raises:
        VersionConflict: ``row`` is active already, or cannot become so; another version than expected was active, or
            another activation came first.
    """
    with transaction.atomic():
        current = MainModelVersion.objects.filter(status=VersionStatus.ACTIVE).first()
        _check_expected(current, expected_active)
        if current is not None and current.pk == row.pk:
            raise VersionConflict(_("Version %(version)s is active already.") % {"version": row.version})
        now = timezone.now()
        if current is not None:
            archived = MainModelVersion.objects.filter(pk=current.pk, status=VersionStatus.ACTIVE).update(
                status=VersionStatus.ARCHIVED, updated_at=now
            )
            if archived != 1:
                raise VersionConflict(_("Another version became active at the same moment."))
        _move_to_active(row, now)
        record(
            action="version.activated",
            actor=actor,
            object_type="MainModelVersion",
            object_id=str(row.pk),
            data={"version": row.version, "previous": current.version if current else None, "reason": reason},
        )
        transaction.on_commit(refresh_active_pointer)
    row.refresh_from_db()


def refresh_active_pointer() -> bool:
    """Make ``ACTIVE.json`` say what the database says; whether it had to be written.

    Two activations may finish in one order and get here in another, so the row is read again after writing.
    """
    written = False
    while True:
        row = MainModelVersion.objects.filter(status=VersionStatus.ACTIVE).first()
        if row is None or read_active_pointer() == active_pointer(row):
            return written
        write_active_pointer(version=row)
        written = True


def resolve_version(text: str) -> MainModelVersion:
    """The version that a person means by its name, by a path inside the store, or by the store's own path (the active one).

    Raises:
        UnknownVersion: none; the message lists the newest.
        NoMainModel: the store's own path, and no version is active.
    """
    usable = bool(text) and "\0" not in text
    row = MainModelVersion.objects.filter(version=text).first() if usable else None
    if row is not None:
        return row
    name = name_below_root(alias=MAIN_MODELS, text=text) if usable else None
    if name == "":
        return active_version()
    if name is not None:
        row = MainModelVersion.objects.filter(model_path=name.split("/")[0]).exclude(model_path="").first()
        if row is not None:
            return row
    known = ", ".join(MainModelVersion.objects.values_list("version", flat=True)[:5]) or _("none")
    raise UnknownVersion(
        _("No main model version %(text)s; the newest are: %(known)s.") % {"text": ascii(text[:80]), "known": known}
    )


def _check_expected(current: MainModelVersion | None, expected: MainModelVersion | None) -> None:
    if expected is not None and (current is None or current.pk != expected.pk):
        raise VersionConflict(
            _("Version %(expected)s was to be replaced, but %(current)s is active now.")
            % {"expected": expected.version, "current": current.version if current else _("none")}
        )


def _move_to_active(row: MainModelVersion, now: Any) -> None:
    try:
        with transaction.atomic():
            changed = MainModelVersion.objects.filter(pk=row.pk, status__in=CAN_BECOME_ACTIVE).update(
                status=VersionStatus.ACTIVE, promoted_at=now, updated_at=now
            )
    except IntegrityError as error:
        raise VersionConflict(_("Another version became active at the same moment.")) from error
    if changed != 1:
        row.refresh_from_db()
        raise VersionConflict(_not_possible(row, CAN_BECOME_ACTIVE))


def _not_possible(row: MainModelVersion, allowed: tuple[VersionStatus, ...]) -> str:
    return _("Version %(version)s is %(status)s; it must be one of %(allowed)s.") % {
        "version": row.version,
        "status": row.status,
        "allowed": ", ".join(allowed),
    }
