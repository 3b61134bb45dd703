"""The root of every refusal of the product."""

from __future__ import annotations


class DomainError(Exception):
    """Something that was asked for and is refused, or could not be done.

    ``code`` is stable: the API makes it a problem type, a command an exit code and the console a message. The message
    names the field and what is allowed, and carries no personal data.
    """

    default_code = "refused"

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code or self.default_code


class UsageError(DomainError):
    """The request itself is wrong (a flag's value, an unknown name): nothing was tried. Exit code 2."""

    default_code = "wrong_usage"


class Skipped(DomainError):
    """There was nothing to do, or not enough to do it with; not a failure. Exit code 3."""

    default_code = "skipped"
