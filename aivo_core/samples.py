"""Encoded samples of one learner: what the encoder produces and every training engine consumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """n samples in the learner's order; a sample is one event t >= 2 with its two rows and its labels.

    Attributes:
        first: (n, input_dim) float32, row with the category unknown (content and path are read from it).
        second: (n, input_dim) float32, the same row with the event's category known (success is read from it).
        content: (n,) int64, category slot of the event.
        path: (n,) int64, kind of step.
        level: (n,) float32, continuous difficulty level of the event's item, 0.5..9.5.
        score: (n,) float32, 0..1.
        position: (n,) int64, how many events of the learner came before (1 for the second event).
        content_prior: (n, content units) float32, the encoder's own forecast q of the next category.
        events: number of events the learner had in all when these were encoded.
    """

    first: FloatArray
    second: FloatArray
    content: IntArray
    path: IntArray
    level: FloatArray
    score: FloatArray
    position: IntArray
    content_prior: FloatArray
    events: int

    def __len__(self) -> int:
        return int(self.content.shape[0])

    def take(self, index: slice | npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Samples:
        """The samples at ``index``, in that order."""
        return Samples(
            first=self.first[index],
            second=self.second[index],
            content=self.content[index],
            path=self.path[index],
            level=self.level[index],
            score=self.score[index],
            position=self.position[index],
            content_prior=self.content_prior[index],
            events=self.events,
        )

    def split_at(self, share: float) -> tuple[Samples, Samples]:
        """Earlier and later part by position in all the learner's events: a sample is later from ``share * events`` on."""
        later = self.position >= share * self.events
        return self.take(~later), self.take(later)


TRAIN_SHARE = 0.7
"""Within a learner the earlier 70 % of events trains, the later 30 % evaluates."""


def concatenate(parts: Sequence[Samples]) -> Samples:
    """All samples of several learners one after the other (``events`` is the total).

    Raises:
        ValueError: no parts.
    """
    if not parts:
        raise ValueError("concatenate needs the samples of at least one learner")
    return Samples(
        first=np.concatenate([part.first for part in parts]),
        second=np.concatenate([part.second for part in parts]),
        content=np.concatenate([part.content for part in parts]),
        path=np.concatenate([part.path for part in parts]),
        level=np.concatenate([part.level for part in parts]),
        score=np.concatenate([part.score for part in parts]),
        position=np.concatenate([part.position for part in parts]),
        content_prior=np.concatenate([part.content_prior for part in parts]),
        events=sum(part.events for part in parts),
    )
