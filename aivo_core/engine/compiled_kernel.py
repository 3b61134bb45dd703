"""Calls the compiled function: checks shapes, lays out working memory, and looks after the cache of compiled code."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from aivo_core.engine import blas, compiled
from aivo_core.engine.backends import FLOAT_BYTES, Trainer
from aivo_core.engine.contract import LearnerTask, LocalTrainingConfig
from aivo_core.engine.generator import drop_threshold, kept_scale
from aivo_core.engine.passes import PRODUCT, PassOutcome, TrainingPass, bias_pass, tail_pass
from aivo_core.engine.tail import TailBase, TailLayout
from aivo_core.network import FloatArray

log = logging.getLogger(__name__)

_COMPILE = "from aivo_core.engine import compiled; compiled.dispatcher(cache=True).compile(compiled.SIGNATURE)"

ALIGNMENT = 16
"""Places in the working memory begin at multiples of this many floats: a cache line."""

KEPT_SAMPLES = 512
"""Working memory for up to this many samples is kept for the next learner; a larger one is given back."""

_EMPTY_INDEX = np.zeros((0, 1), dtype=np.int32)
_EMPTY_COUNTS = np.zeros(0, dtype=np.int64)
_EMPTY_SIZES = np.zeros(0, dtype=np.float32)


class CompiledKernel:
    """The compiled function, once ``compile`` has been called."""

    backend = f"numba {numba.__version__}"

    def __init__(self) -> None:
        self._kept = True
        try:
            self._function = compiled.dispatcher(cache=True)
        except RuntimeError as error:
            log.warning("compiled code cannot be kept (%s): every process compiles anew", error)
            self._kept = False
            self._function = compiled.dispatcher(cache=False)

    def is_cached(self) -> bool:
        """Whether ``compile`` only loads a file: one made from this source, by this Numba, for this processor.

        Numba does not say so in public; a version that keeps its cache in another way is taken to have none yet, and loads
        in the background.
        """
        cache, context = self._function._cache, self._function.targetctx
        key_of, file = getattr(cache, "_index_key", None), getattr(cache, "_cache_file", None)
        if key_of is None or file is None or not hasattr(file, "_load_index"):
            return False
        return key_of(compiled.SIGNATURE, context.codegen()) in file._load_index()

    def compile(self) -> None:
        """Load the compiled function from the cache; where it is not there, a process of its own compiles it first (seconds).

        Code that a process compiled itself and the same code loaded from the cache give other last bits: so that a learner's
        bytes do not depend on who compiled, everybody loads. The compiler's memory goes with its process, too.
        """
        if self._kept and not self.is_cached():
            _compile_elsewhere()
        self._function.compile(compiled.SIGNATURE)
        self._function.disable_compile()

    def trainer(self, base: TailBase, config: LocalTrainingConfig, objective: str) -> Trainer:
        """A function for one thread that trains checked tasks one after the other in one working memory."""
        if config.is_private:
            from aivo_core.engine.private_kernel import CompiledPrivateTrainer  # compiled only where it is used

            return CompiledPrivateTrainer(base, config)
        return _CompiledTrainer(self._function, base, config, objective)

    def working_bytes(self, layout: TailLayout, trunk_width: int, batch_size: int, samples: int) -> int:
        return FLOAT_BYTES * memory_layout(layout, trunk_width, batch_size, samples).size


def _compile_elsewhere() -> None:
    """Fill the cache from another process; where that fails, whoever asked compiles here, and the log says so."""
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    done = subprocess.run(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-c", _COMPILE],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        output = done.stdout.decode("utf-8", errors="replace").strip()[-300:]
        log.warning("the engine could not be compiled in a process of its own, and is compiled here: %s", output)


@dataclass(frozen=True)
class MemoryLayout:
    """Where everything lies in the working memory, in floats.

    Attributes:
        places: (PLACES + 1,) int64, see ``compiled``; the last is the end.
        at: (blocks, 3) int64: hidden, kept, output of each hidden block.
    """

    places: npt.NDArray[np.int64]
    at: npt.NDArray[np.int64]

    @property
    def size(self) -> int:
        return int(self.places[-1])


@lru_cache(maxsize=512)
def memory_layout(layout: TailLayout, trunk_width: int, batch_size: int, samples: int) -> MemoryLayout:
    """For one learner with so many samples; places up to STATE depend on the tail alone."""
    rows = 2 * min(batch_size, samples)
    widest = max([layout.hidden_dim, *(block.units for block in layout.blocks)])
    wide = layout.content.units + layout.path.units
    units = [block.units for block in layout.blocks]
    state = 3 * compiled.STATE_BLOCK * -(-layout.size // compiled.STATE_BLOCK)
    sizes = [layout.size, layout.size, state, *[samples * layout.feature_dim] * 2]
    sizes += [*[rows * layout.feature_dim] * 2, rows * wide, rows * layout.difficulty.units]
    sizes += [rows * widest] * 3 + [widest] * 2
    at_starts = _starts([rows * n for n in units for _ in range(3)])
    trunk = 2 * _aligned(min(samples, compiled.TRUNK_ROWS) * trunk_width)
    places = _starts([*sizes, max(int(at_starts[-1]), trunk)])
    at = places[compiled.BLOCKS] + at_starts[:-1].reshape(len(units), 3)
    return MemoryLayout(places, np.ascontiguousarray(at))


def _starts(sizes: list[int]) -> npt.NDArray[np.int64]:
    return np.cumsum([0, *(_aligned(size) for size in sizes)], dtype=np.int64)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def aligned_memory(size: int) -> FloatArray:
    """At least ``size`` floats, beginning at a cache line."""
    fresh = np.empty(size + ALIGNMENT, dtype=np.float32)
    skipped = (-fresh.ctypes.data // FLOAT_BYTES) % ALIGNMENT
    return fresh[skipped:]


class _CompiledTrainer:
    """Trains tasks on one base, one after the other."""

    def __init__(self, function: Any, base: TailBase, config: LocalTrainingConfig, objective: str) -> None:
        self._function = function
        self._config = config
        self._product = objective == PRODUCT
        self._small_product = blas.small_product()
        self._layout = base.layout
        self._base = base_arguments(base, dropout=config.dropout)
        self._trunk_width = max([base.trunk.units, *(layer.kernel.shape[1] for layer in base.trunk.layers)])
        self._kept: FloatArray = np.zeros(0, dtype=np.float32)

    def __call__(self, task: LearnerTask) -> PassOutcome:
        """Both passes; the shapes that the compiled function relies on were checked by ``check_task``."""
        config, samples = self._config, task.samples
        tail_training, bias_training = tail_pass(config, task), bias_pass(config, task)
        memory = memory_layout(self._layout, self._trunk_width, config.batch_size, len(samples))
        tail, after = np.empty(self._layout.size, dtype=np.float32), np.empty(self._layout.size, dtype=np.float32)
        losses, bias_losses = _losses(tail_training), _losses(bias_training)
        self._function(
            *self._base,
            *(np.ascontiguousarray(rows) for rows in (samples.first, samples.second)),
            *(np.ascontiguousarray(labels, dtype=np.int64) for labels in (samples.content, samples.path)),
            *(np.ascontiguousarray(values, dtype=np.float32) for values in (samples.level, samples.score)),
            *(np.ascontiguousarray(given) for given in (task.start_tail, task.anchor_tail)),
            *_pass_arguments(tail_training),
            *_pass_arguments(bias_training),
            np.float32(config.proximal_mu),
            np.float32(config.momentum),
            config.optimiser == "adam",
            self._product,
            self._small_product,
            self._working_memory(memory.size, len(samples)),
            memory.places,
            memory.at,
            tail,
            after,
            losses,
            bias_losses,
        )
        return PassOutcome(
            tail,
            after,
            tail_training.plan.epoch_means(losses) if tail_training else (),
            bias_training.plan.epoch_means(bias_losses) if bias_training else (),
            len(losses) + len(bias_losses),
        )

    def _working_memory(self, size: int, samples: int) -> FloatArray:
        if self._kept.size >= size:
            return self._kept
        memory = aligned_memory(size)
        if samples <= KEPT_SAMPLES:
            self._kept = memory
        return memory


def base_arguments(base: TailBase, *, dropout: bool) -> tuple[npt.NDArray[Any], ...]:
    """What is the same for all learners: trunk, its table (rows, units, kernel, bias), last normalisation; tables of the
    tail, statistics, thresholds and scales of the dropout."""
    parts = [part.ravel() for layer in base.trunk.layers for part in (layer.kernel, layer.bias)]
    starts = np.cumsum([0, *(part.size for part in parts)])
    table = [(*layer.kernel.shape, starts[2 * i], starts[2 * i + 1]) for i, layer in enumerate(base.trunk.layers)]
    rates = [block.rate if dropout else 0.0 for block in base.layout.blocks]
    return (
        _joined(parts),
        np.array(table, dtype=np.int64).reshape(len(table), 4),
        base.trunk.scale,
        base.trunk.shift,
        base.layout.block_table,
        base.layout.head_table,
        _joined(base.mean),
        _joined(base.inverse_deviation),
        np.array([drop_threshold(rate) for rate in rates], dtype=np.uint64),
        np.array([kept_scale(rate) for rate in rates], dtype=np.float32),
    )


def _joined(parts: Any) -> FloatArray:
    return np.concatenate([np.zeros(0, dtype=np.float32), *parts])


def _pass_arguments(training: TrainingPass | None) -> Iterator[Any]:
    """Sample numbers, counts, step sizes, key; without a step where there is no pass."""
    if training is None:
        yield from (_EMPTY_INDEX, _EMPTY_COUNTS, _EMPTY_SIZES, np.uint64(0))
    else:
        yield from (training.plan.index, training.counts, training.step_sizes, np.uint64(training.key))


def _losses(training: TrainingPass | None) -> FloatArray:
    return np.zeros(training.steps if training else 0, dtype=np.float32)
