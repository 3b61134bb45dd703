"""What happens to learners and must be acted on above: upper apps subscribe in ``AppConfig.ready``.

Each signal is sent inside the transaction of the change: a receiver's own writes stand or fall with it, and an error in a
receiver undoes the change and reaches the caller.
"""

from __future__ import annotations

from django.dispatch import Signal

assessment_completed = Signal()
"""A baseline assessment was completed. Sent by ``Learner`` with ``learner`` and ``assessment`` (``BaselineAssessment``)."""

consent_withdrawn = Signal()
"""A consent was withdrawn or refused. Sent by ``Learner`` with ``learner`` and ``kind`` (a ``ConsentKind``)."""

learner_erased = Signal()
"""A learner is being erased. Sent by ``Learner`` with ``learner``, still stored, before its rows go."""
