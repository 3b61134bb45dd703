"""The stamp of a learner's history: a new random one with every change of its interactions.

Whoever keeps something made of a history (an encoder state in the database or in memory) keeps the stamp beside it, read
*before* the history. While the learner still has that stamp, nothing has changed since, which costs one column to know and no
counting. A random stamp and not a counter: a counter's next value would come twice where a transaction is rolled back.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from uuid import UUID

from learners.models import Learner

_KEYS_PER_QUERY = 500


def stamp_histories(learners: Iterable[UUID]) -> None:
    """Give the learners with these primary keys a new stamp; inside the transaction that changes their interactions.

    Call it before the interactions are written: it locks the learners, in one order, so that two writers of the same
    learners wait for each other instead of colliding.

    Raises:
        django.db.transaction.TransactionManagementError: there is no transaction.
    """
    keys = sorted(set(learners))
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        rows = Learner.objects.filter(pk__in=keys[start : start + _KEYS_PER_QUERY])
        list(rows.select_for_update(no_key=True).order_by("pk").values_list("pk"))
        rows.update(history_stamp=uuid.uuid4())
