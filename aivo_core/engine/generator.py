"""Random numbers for dropout that depend on where they are used and on nothing else.

A number is a function of the learner's seed, the pass, the step, the layer and its place in the layer's output: no state
is carried, so that learners may be trained in any order and on any thread. The function is SplitMix64 (Steele, Lea and
Flood 2014, "Fast Splittable Pseudorandom Number Generators"): the finaliser ``mix`` over a Weyl sequence that starts at
the layer's key; each 64-bit word gives two 32-bit numbers. Fast, well distributed, and not cryptographic.
``aivo_core.engine.compiled`` has the same function; a test compares the bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from aivo_core.engine.session import DROPOUT_STREAM

GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
LAYERS = 256
"""Keys of one step lie this far apart; no tail has more hidden blocks."""

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


def pass_key(seed: int, training_pass: int) -> int:
    """64-bit key of one pass of one learner."""
    return int(np.random.SeedSequence([seed, DROPOUT_STREAM, training_pass]).generate_state(1, np.uint64)[0])


def layer_key(key: int, step: int, layer: int) -> int:
    """64-bit key of hidden block ``layer`` of the tail (from 0) in ``step`` (from 0) of the pass."""
    z = (key + GOLDEN * (step * LAYERS + layer + 1)) & _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def layer_keys(keys: U64, step: int, layer: int) -> U64:
    """``layer_key`` of each of (n,) ``keys``."""
    return _mix(keys + np.uint64(GOLDEN * (step * LAYERS + layer + 1) & _MASK))


def uniform_words(key: int, count: int) -> U32:
    """``count`` uniform 32-bit numbers: low halves of ceil(count / 2) words, then their high halves."""
    words: U32 = uniform_rows(np.array([key], dtype=np.uint64), count)[0]
    return words


def uniform_rows(keys: U64, count: int) -> U32:
    """(n, count) ``uniform_words`` of each of (n,) ``keys``."""
    half = (count + 1) // 2
    z = _mix(np.arange(1, half + 1, dtype=np.uint64) * np.uint64(GOLDEN) + keys[:, None])
    words = [(z & np.uint64(0xFFFFFFFF)).astype(np.uint32), (z >> np.uint64(32)).astype(np.uint32)]
    return np.concatenate(words, axis=1)[:, :count]


def _mix(z: U64) -> U64:
    """SplitMix64's finaliser; products and sums wrap, as NumPy's of arrays do."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))


def drop_threshold(rate: float) -> int:
    """A unit is dropped where its number lies below this."""
    return round(rate * 2**32)


def kept_scale(rate: float) -> np.float32:
    """What a kept unit is multiplied by (inverted dropout)."""
    return np.float32(1.0 / (1.0 - rate))
