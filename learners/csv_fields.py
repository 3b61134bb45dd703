"""What each field of a row may hold. Every refusal has a stable reason and a sentence that says what is allowed."""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import UTC, datetime

from django.utils.translation import gettext as _

MAX_SEQ = 2**63 - 1
MAX_COUNT = 2**31 - 1
LEARNER_ID_LENGTH = 64

_LEARNER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_EVENT_ID = re.compile(r"[!-~]{1,64}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,3})?")
_WHOLE = re.compile(r"([0-9]{1,19})(?:\.0{1,10})?")  # 3.0 is how table programs write the 3 of a column with gaps


class BadField(Exception):
    """The row is refused."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def check_learner_id(value: str) -> None:
    """Letters, digits, dot, underscore and hyphen of ASCII, at most 64, beginning with a letter or digit.

    Raises:
        BadField: ``learner_id_empty``, ``learner_id_too_long``, ``learner_id_not_ascii`` (a letter that may only look like an
            allowed one), ``learner_id_bad_character``, ``learner_id_bad_start``.
    """
    if _LEARNER_ID.fullmatch(value):
        return
    allowed = _("allowed: A-Z a-z 0-9 . _ - , at most 64, beginning with a letter or digit.")
    if not value:
        raise BadField("learner_id_empty", _("learner_id must not be empty; %(allowed)s") % {"allowed": allowed})
    if len(value) > LEARNER_ID_LENGTH:
        message = _("learner_id has %(length)d characters; %(allowed)s") % {"length": len(value), "allowed": allowed}
        raise BadField("learner_id_too_long", message)
    foreign = next((character for character in value if ord(character) > 127), None)
    if foreign is not None:
        name = unicodedata.name(foreign, "?")
        message = _("learner_id holds U+%(code)04X (%(name)s), which is not ASCII; %(allowed)s")
        raise BadField("learner_id_not_ascii", message % {"code": ord(foreign), "name": name, "allowed": allowed})
    bad = re.search(r"[^A-Za-z0-9._-]", value)
    if bad is not None:
        message = _("learner_id holds %(character)r; %(allowed)s") % {"character": bad.group(), "allowed": allowed}
        raise BadField("learner_id_bad_character", message)
    message = _("learner_id begins with %(character)r; %(allowed)s") % {"character": value[0], "allowed": allowed}
    raise BadField("learner_id_bad_start", message)


def score(value: str) -> float:
    """A number from 0 to 1.

    Raises:
        BadField: ``score_empty``, ``score_not_a_number``, ``score_out_of_range``.
    """
    if value in ("0", "1"):
        return float(value)
    if not value:
        raise BadField("score_empty", _("score must not be empty; allowed: a number from 0 to 1."))
    if not _NUMBER.fullmatch(value):
        raise BadField("score_not_a_number", _("score must be a number from 0 to 1, not %(value)r.") % {"value": value[:40]})
    number = float(value)
    if not 0.0 <= number <= 1.0:
        raise BadField("score_out_of_range", _("score must lie from 0 to 1, not %(value)r.") % {"value": value[:40]})
    return number + 0.0  # "-0" becomes 0


def time_of(value: str, latest: datetime) -> datetime | None:
    """ISO 8601 with a zone, as UTC; None where empty.

    Raises:
        BadField: ``time_not_iso8601``, ``time_without_zone``, ``time_in_future`` (after ``latest``).
    """
    if not value:
        return None
    try:
        time = datetime.fromisoformat(value)
        if time.tzinfo is None:
            message = _("occurred_at %(value)r has no zone; allowed: ISO 8601 with Z or an offset, as 2025-03-01T09:30:00Z.")
            raise BadField("time_without_zone", message % {"value": value[:40]})
        time = time.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        message = _("occurred_at %(value)r is not ISO 8601; allowed: as 2025-03-01T09:30:00Z.") % {"value": value[:40]}
        raise BadField("time_not_iso8601", message) from error
    if time > latest:
        message = _("occurred_at %(value)r lies in the future; allowed: up to now.") % {"value": value[:40]}
        raise BadField("time_in_future", message)
    return time


def whole_number(name: str, value: str, largest: int) -> int | None:
    """A whole number from 0 to ``largest``; None where empty.

    Raises:
        BadField: ``<name>_not_a_whole_number``, ``<name>_out_of_range``.
    """
    if not value:
        return None
    match = _WHOLE.fullmatch(value)
    if match is None:
        message = _("%(name)s must be a whole number from 0 to %(largest)d, not %(value)r.")
        raise BadField(f"{name}_not_a_whole_number", message % {"name": name, "largest": largest, "value": value[:40]})
    number = int(match.group(1))
    if number > largest:
        message = _("%(name)s must be at most %(largest)d.") % {"name": name, "largest": largest}
        raise BadField(f"{name}_out_of_range", message)
    return number


def milliseconds(name: str, value: str) -> int | None:
    """A number of milliseconds from 0 to 2^31 - 1, rounded; None where empty.

    Raises:
        BadField: ``<name>_not_a_number``, ``<name>_out_of_range``.
    """
    number = real_number(name, value)
    if number is None:
        return None
    if not 0 <= number <= MAX_COUNT:
        message = _("%(name)s must lie from 0 to %(largest)d.") % {"name": name, "largest": MAX_COUNT}
        raise BadField(f"{name}_out_of_range", message)
    return round(number)


def real_number(name: str, value: str) -> float | None:
    """A finite number; None where empty.

    Raises:
        BadField: ``<name>_not_a_number``.
    """
    if not value:
        return None
    number = float(value) if _NUMBER.fullmatch(value) else math.nan
    if not math.isfinite(number):
        message = _("%(name)s must be a number, not %(value)r.") % {"name": name, "value": value[:40]}
        raise BadField(f"{name}_not_a_number", message)
    return number


def text(name: str, value: str, longest: int) -> str:
    """A text of at most ``longest`` characters, as it stands.

    Raises:
        BadField: ``<name>_too_long``.
    """
    if len(value) > longest:
        message = _("%(name)s has %(length)d characters; allowed: %(longest)d.")
        raise BadField(f"{name}_too_long", message % {"name": name, "length": len(value), "longest": longest})
    return value


def event_id(value: str) -> str:
    """The file's own event id: 1 to 64 visible ASCII characters, or empty.

    Raises:
        BadField: ``event_id_not_allowed``.
    """
    if value and not _EVENT_ID.fullmatch(value):
        raise BadField("event_id_not_allowed", _("event_id must be 1 to 64 visible ASCII characters without spaces."))
    return value
