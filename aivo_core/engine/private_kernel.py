"""Calls the compiled functions of private training: lays out working memory, and draws chance by ChaCha20."""

from __future__ import annotations

import logging
import os
import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from aivo_core.engine import blas, compiled, compiled_chance, compiled_private
from aivo_core.engine.compiled_kernel import aligned_memory, base_arguments, memory_layout
from aivo_core.engine.contract import LearnerTask, LocalTrainingConfig
from aivo_core.engine.passes import PassOutcome
from aivo_core.engine.private import ChanceSource, Keys, Rows, train_privately
from aivo_core.engine.reference import Learner
from aivo_core.engine.tail import TailBase, TailLayout
from aivo_core.network import FloatArray
from aivo_core.privacy import DoubleArray

log = logging.getLogger(__name__)


class Functions(NamedTuple):
    """What is compiled: of ``compiled_private`` and of ``compiled_chance``."""

    arithmetic: compiled_private.Dispatchers
    chance: compiled_chance.Dispatchers


_functions: Functions | None = None
_lock = threading.Lock()


def functions() -> Functions:
    """The compiled functions, loaded or compiled (half a minute) once a process, when they are first asked for."""
    global _functions
    with _lock:
        if _functions is None:
            found = _new_functions()
            for dispatchers in found:
                dispatchers.compile()
            _functions = found
        return _functions


def _new_functions() -> Functions:
    try:
        return Functions(compiled_private.dispatchers(cache=True), compiled_chance.dispatchers(cache=True))
    except RuntimeError as error:
        log.warning("compiled code of private training cannot be kept (%s): every process compiles anew", error)
        return Functions(compiled_private.dispatchers(cache=False), compiled_chance.dispatchers(cache=False))


CHACHA_CONSTANTS = b"expand 32-byte k"
KEY_BYTES = 32


class ChaChaChance:
    """The key stream of ChaCha20, which nobody can tell from chance who does not have its key.

    Faster than asking the operating system for each number. The key comes from there, is for one training, and is stored
    nowhere.

    Args:
        key: 32 bytes; None takes fresh ones from the operating system's secure generator. Others are for tests alone.
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = os.urandom(KEY_BYTES) if key is None else key
        self._state = np.frombuffer(CHACHA_CONSTANTS + key + bytes(16), dtype="<u4").astype(np.uint32)
        self._block = 0
        self._noise: DoubleArray = np.zeros(0)

    def random_bytes(self, count: int) -> bytes:
        words = np.empty(-(-count // 4), dtype=np.uint32)
        functions().chance.words(self._state, np.uint64(self._block), words)
        self._block += -(-len(words) // 16)
        return words.tobytes()[:count]

    def noise(self, size: int, std: float) -> DoubleArray:
        """``aivo_core.privacy.gaussian`` on the stream, in an array that the next call uses again."""
        if len(self._noise) != size:
            self._noise = np.empty(size)
        functions().chance.normals(self._state, np.uint64(self._block), std, self._noise)
        self._block += -(-size // compiled_chance.NORMALS) * compiled_chance.LANES
        return self._noise


class CompiledPrivateTail:
    """``PrivateTail`` in compiled loops, for one learner at a time on one thread."""

    def __init__(self, base: TailBase, config: LocalTrainingConfig) -> None:
        self._functions = functions().arithmetic
        self._base = base
        self._config = config
        self._layout = base.layout
        self._arguments = base_arguments(base, dropout=config.dropout)[4:]
        self._limit = blas.small_product()
        self._order = packed_order(base.layout)
        self._memory: FloatArray = np.zeros(0, dtype=np.float32)
        self._places: npt.NDArray[np.int64] = np.zeros(compiled.PLACES + 1, dtype=np.int64)
        self._at: npt.NDArray[np.int64] = np.zeros((0, 3), dtype=np.int64)

    def begin(self, task: LearnerTask) -> None:
        """Take up another learner."""
        learner = Learner.of(self._base, task.samples)
        labels = (np.ascontiguousarray(labels, dtype=np.int64) for labels in (learner.content, learner.path))
        values = (np.ascontiguousarray(v, dtype=np.float32) for v in (task.samples.level, task.samples.score))
        self._learner = (np.ascontiguousarray(learner.first), np.ascontiguousarray(learner.second), *labels, *values)
        self._make_room(min(2 * self._config.batch_size, len(task.samples)))
        weights, state = self._part(compiled.W), self._part(compiled.STATE)
        weights[: self._layout.size] = task.start_tail[self._order]
        state[:] = 0.0
        anchors = state.reshape(-1, 3, compiled.STATE_BLOCK)[:, 2]
        padded = np.zeros(anchors.size, dtype=np.float32)
        padded[: self._layout.size] = task.anchor_tail[self._order]
        anchors[:] = padded.reshape(anchors.shape)

    def clipped_sum(self, rows: Rows, keys: Keys) -> None:
        self._make_room(len(rows))
        self._functions.clipped_sum(
            *self._arguments, *self._learner, rows, keys, float(self._config.sample_clip_norm or 0.0), self._limit,
            self._memory, self._places, self._at, self._layout.size,
        )  # fmt: skip

    def noised_step(self, noise: DoubleArray, expected: int, size: np.float32) -> None:
        start, config = self._layout.heads_start, self._config
        noise[start:] = noise[self._order[start:]]
        self._functions.noised_step(
            noise, float(expected), size, np.float32(config.proximal_mu), np.float32(config.momentum),
            config.optimiser == "adam", self._memory, self._places,
        )  # fmt: skip

    def tail(self) -> FloatArray:
        return self._unpacked(compiled.W)

    def last_sum(self) -> FloatArray:
        """(tail_size,) float32, a copy of the last clipped sum; no more after a step."""
        return self._unpacked(compiled.G)

    def _part(self, place: int) -> FloatArray:
        return self._memory[self._places[place] : self._places[place + 1]]

    def _unpacked(self, place: int) -> FloatArray:
        flat = np.empty(self._layout.size, dtype=np.float32)
        flat[self._order] = self._part(place)[: self._layout.size]
        return flat

    def _make_room(self, batch: int) -> None:
        """Working memory for a batch of so many samples; weights and state stay."""
        needed = memory_layout(self._layout, 1, batch, batch)
        if needed.size <= len(self._memory):
            return
        larger = aligned_memory(needed.size)
        kept = int(self._places[compiled.FIRST])
        larger[:kept] = self._memory[:kept]
        self._memory, self._places, self._at = larger, needed.places, needed.at


class CompiledPrivateTrainer:
    """Trains checked tasks on one base privately, one after the other."""

    def __init__(self, base: TailBase, config: LocalTrainingConfig) -> None:
        self._tail = CompiledPrivateTail(base, config)
        self._config = config

    def __call__(self, task: LearnerTask) -> PassOutcome:
        """All steps, on a stream of chance that is this call's own."""
        chance: ChanceSource = ChaChaChance()

        def begun() -> CompiledPrivateTail:
            self._tail.begin(task)
            return self._tail

        return train_privately(self._config, task, begun, chance)


def packed_order(layout: TailLayout) -> npt.NDArray[np.int64]:
    """Places of a flat tail in the order of ``compiled.pack``: packed = flat[order], and flat[order] = packed."""
    order = np.arange(layout.size, dtype=np.int64)
    columns = []
    for head in (layout.content, layout.path):
        kernel = head.kernel + np.arange(layout.hidden_dim * head.units).reshape(layout.hidden_dim, head.units)
        columns.append(np.vstack([kernel, head.bias + np.arange(head.units)]))
    level = layout.difficulty
    level_parts = [level.kernel + np.arange(layout.hidden_dim * level.units), level.bias + np.arange(level.units)]
    order[layout.heads_start :] = np.concatenate([np.hstack(columns).ravel(), *level_parts])
    return order
