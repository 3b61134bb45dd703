"""What the encoder refuses, and why."""

from __future__ import annotations


class EncodingError(ValueError):
    """Events, a state or an encoder file that cannot be used.

    ``code`` is stable: ``bad_event``, ``bad_state``, ``bad_encoder``, ``different_encoder``, ``no_events``,
    ``unknown_learner``, ``duplicate_learner``, ``too_few_learners``. The message names the field and what is allowed.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code
