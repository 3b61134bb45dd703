"""Compiled arithmetic of private training: ``aivo_core.engine.private_reference`` in loops.

Uses the loops of ``aivo_core.engine.compiled``, whose remarks hold here too. Numba's cache looks at this file alone to see
whether it is stale: the functions that ``dispatchers`` makes carry a checksum of the other file, which is part of the key.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from aivo_core.engine import compiled
from aivo_core.engine.compiled import (
    CLASS_LOGITS,
    HELPER,
    LEVEL_LOGITS,
    LEVELS,
    SHIFT,
    SLOPE,
    STATE,
    UP,
    UP_BACK,
    UP_CLASS,
    WHOLE,
    X_BLOCKS,
    G,
    W,
    X,
    activate_block,
    add,
    backward_block,
    class_rows,
    fill_kept,
    first_gradient,
    gather,
    layer_key,
    level_rows,
    matrix,
    multiply,
    product,
    sum_rows,
    update,
)

CLIP_ALLOWANCE = 2.0**-20
SQUARE_ALLOWANCE = 1e-12


@njit(**HELPER)
def drop_out_rows(output, block, count, drop, keep, keys, memory, at):
    """Dropout of one block by each sample's own key and its pass."""
    if drop[block] == np.uint64(0):
        return
    units = output.shape[1]
    kept = matrix(memory, at[block, 1], output.shape[0], units)
    for i in range(output.shape[0]):
        one_pass = 0 if i < count else 1
        fill_kept(kept[i], layer_key(keys[i - one_pass * count], one_pass, block), drop[block], keep[block])
        multiply(output[i], kept[i])


@njit(**HELPER)
def forward_rows(x, w, blocks, mean, inverse, drop, keep, keys, memory, places, at, limit):
    rows, statistics = x.shape[0], 0
    for block in range(blocks.shape[0]):
        units = blocks[block, 1]
        hidden = matrix(memory, at[block, 0], rows, units)
        product(x, matrix(w, blocks[block, 2], blocks[block, 0], units), hidden, limit)
        output = matrix(memory, at[block, 2], rows, units)
        activate_block(hidden, output, w, blocks[block], mean, inverse, statistics, memory, places)
        drop_out_rows(output, block, keys.size, drop, keep, keys, memory, at)
        statistics += units
        x = output
    return x


@njit(**HELPER)
def dot(left, right):
    """In double precision, of single precision numbers."""
    total = 0.0
    for j in range(right.size):
        total += np.float64(left[j]) * np.float64(right[j])
    return total


@njit(**HELPER)
def add_product_norms(inputs, errors, count, norms):
    """What a kernel and its biases add to squared norms (0) and to the same without cancellation (1)."""
    one = 1.0
    for i in range(count):
        own = (dot(inputs[i], inputs[i]) + one) * dot(errors[i], errors[i])
        between = 0.0
        if errors.shape[0] > count:
            j = i + count
            own += (dot(inputs[j], inputs[j]) + one) * dot(errors[j], errors[j])
            between = (dot(inputs[i], inputs[j]) + one) * dot(errors[i], errors[j])
        norms[0, i] += own + 2.0 * between
        norms[1, i] += own


@njit(**HELPER)
def add_beta_norms(first, second, norms, i):
    apart = together = 0.0
    for j in range(second.size):
        a, b = np.float64(first[j]), np.float64(second[j])
        apart += a * a + b * b
        together += (a + b) * (a + b)
    norms[0, i] += together
    norms[1, i] += apart


@njit(**HELPER)
def normalisation_terms(up, hidden, centre, inverse, out):
    for j in range(centre.size):
        out[j] = up[j] * (hidden[j] - centre[j]) * inverse[j]


@njit(**HELPER)
def through_rectifier_rows(up, hidden, slope, errors):
    for i in range(up.shape[0]):
        a, h, e = up[i], hidden[i], errors[i]
        for j in range(slope.size):
            e[j] = a[j] * slope[j] if h[j] > np.float32(0.0) else np.float32(0.0)


@njit(**HELPER)
def keep_arriving(up, kept, dropped):
    """Through the dropout, into the place of its multipliers."""
    for i in range(up.size):
        kept[i] = up[i] * kept[i] if dropped else up[i]


@njit(**HELPER)
def block_norms(arriving, hidden, w, block, mean, inverse, statistics, errors, count, norms, memory, places):
    """Norms of gamma and beta, and the errors by the product."""
    units = block[1]
    slope = memory[places[SLOPE] : places[SLOPE] + units]
    terms = memory[places[SHIFT] : places[SHIFT] + units]
    centre, deviation = mean[statistics : statistics + units], inverse[statistics : statistics + units]
    other = errors[0]
    for i in range(count):
        add_beta_norms(arriving[i], arriving[i + count], norms, i)
        normalisation_terms(arriving[i], hidden[i], centre, deviation, terms)
        normalisation_terms(arriving[i + count], hidden[i + count], centre, deviation, other)
        add_beta_norms(terms, other, norms, i)
    for j in range(units):
        slope[j] = w[block[4] + j] * deviation[j]
    through_rectifier_rows(arriving, hidden, slope, errors)


@njit(**HELPER)
def norms_of_blocks(x, w, blocks, mean, inverse, drop, count, norms, memory, places, at):
    """From UP down; what arrives at each block is left in the place of its dropout's multipliers."""
    rows, statistics = x.shape[0], mean.size
    here, there = places[UP], places[UP_BACK]
    for block in range(blocks.shape[0] - 1, -1, -1):
        units, inputs = blocks[block, 1], blocks[block, 0]
        statistics -= units
        up, arriving = matrix(memory, here, rows, units), matrix(memory, at[block, 1], rows, units)
        keep_arriving(up.reshape(up.size), arriving.reshape(up.size), drop[block] > np.uint64(0))
        hidden = matrix(memory, at[block, 0], rows, units)
        block_norms(arriving, hidden, w, blocks[block], mean, inverse, statistics, up, count, norms, memory, places)
        below = x if block == 0 else matrix(memory, at[block - 1, 2], rows, inputs)
        add_product_norms(below, up, count, norms)
        if block > 0:
            np.dot(up, matrix(w, blocks[block, 2], inputs, units).T, matrix(memory, there, rows, inputs))
            here, there = there, here


@njit(**HELPER)
def clip_factors(norms, clip, factors):
    for i in range(factors.size):
        square = norms[0, i] if norms[0, i] > 0.0 else 0.0
        bound = math.sqrt(square + SQUARE_ALLOWANCE * norms[1, i]) + CLIP_ALLOWANCE * math.sqrt(2.0 * norms[1, i])
        factors[i] = np.float32(1.0) if bound <= clip else np.float32(clip / bound)
        if not (norms[0, i] < np.inf and norms[1, i] < np.inf):
            factors[i] = np.float32(0.0)


@njit(**HELPER)
def scale_rows(rows, factors):
    """Each row by its sample's factor; a factor of 0 makes 0 of whatever there is."""
    zero = np.float32(0.0)
    for i in range(rows.shape[0]):
        row, factor = rows[i], factors[i % factors.size]
        if factor == zero:
            row[:] = zero
        elif factor != np.float32(1.0):
            for j in range(row.size):
                row[j] *= factor


@njit(**HELPER)
def silence_rows(rows, factors):
    """0 in the rows of samples that add nothing: 0 times what is not finite would be NaN."""
    for i in range(rows.shape[0]):
        if factors[i % factors.size] == np.float32(0.0):
            rows[i][:] = np.float32(0.0)


@njit(**HELPER)
def sum_of_blocks(x, w, g, blocks, mean, inverse, factors, memory, places, at, limit):
    rows, statistics = x.shape[0], 0
    silence_rows(x, factors)
    for block in range(blocks.shape[0]):
        units = blocks[block, 1]
        errors = matrix(memory, at[block, 1], rows, units)
        hidden = matrix(memory, at[block, 0], rows, units)
        scale_rows(errors, factors)
        silence_rows(hidden, factors)
        backward_block(errors, hidden, w, g, blocks[block], mean, inverse, statistics, memory, places)
        gradient = matrix(g, blocks[block, 2], blocks[block, 0], units)
        if block == 0:
            first_gradient(x, errors, gradient, memory[places[X_BLOCKS] :], limit)
        else:
            np.dot(matrix(memory, at[block - 1, 2], rows, blocks[block, 0]).T, errors, gradient)
        silence_rows(matrix(memory, at[block, 2], rows, units), factors)
        statistics += units


@njit(**HELPER)
def sum_batch(
    blocks, heads, mean, inverse, drop, keep, one, two, content, path, level, score, rows, keys, clip, limit,
    memory, places, at, tail_size,
):  # fmt: skip
    """The clipped gradients' sum over a batch that is not empty, into G."""
    count, features = rows.size, one.shape[1]
    width = blocks[blocks.shape[0] - 1, 1] if blocks.shape[0] else features
    start = min(heads[0, 1], heads[1, 1], heads[2, 1])
    w, g = memory[places[W] : places[W] + tail_size], memory[places[G] : places[G] + tail_size]
    wide = heads[0, 0] + heads[1, 0]
    class_bias, level_kernel = start + width * wide, start + (width + 1) * wide
    level_bias = level_kernel + width * LEVELS
    unit = np.float32(1.0)
    norms, factors = np.zeros((2, count), dtype=np.float64), np.empty(count, dtype=np.float32)

    x = matrix(memory, places[X], 2 * count, features)
    gather(x[:count], one, rows, count)
    gather(x[count:], two, rows, count)
    hidden = forward_rows(x, w, blocks, mean, inverse, drop, keep, keys, memory, places, at, limit)

    logits = matrix(memory, places[CLASS_LOGITS], count, wide)
    np.dot(hidden[:count], matrix(w, start, width, wide), logits)
    bias = w[class_bias : class_bias + wide]
    class_rows(logits, 0, heads[0, 0], bias[: heads[0, 0]], content, rows, count, unit)
    class_rows(logits, heads[0, 0], heads[1, 0], bias[heads[0, 0] :], path, rows, count, unit)
    both = matrix(memory, places[LEVEL_LOGITS], 2 * count, LEVELS)
    np.dot(hidden, matrix(w, level_kernel, width, LEVELS), both)
    level_rows(both, w[level_bias : level_bias + LEVELS], level, score, rows, count, np.float32(0.5))
    add_product_norms(hidden, logits, count, norms)
    add_product_norms(hidden, both, count, norms)

    np.dot(both, matrix(w, level_kernel, width, LEVELS).T, matrix(memory, places[UP], 2 * count, width))
    np.dot(logits, matrix(w, start, width, wide).T, matrix(memory, places[UP_CLASS], count, width))
    add(memory[places[UP] : places[UP] + count * width], memory[places[UP_CLASS] : places[UP_CLASS] + count * width])
    norms_of_blocks(x, w, blocks, mean, inverse, drop, count, norms, memory, places, at)
    clip_factors(norms, clip, factors)

    scale_rows(logits, factors)
    scale_rows(both, factors)
    sum_of_blocks(x, w, g, blocks, mean, inverse, factors, memory, places, at, limit)
    np.dot(hidden[:count].T, logits, matrix(g, start, width, wide))
    sum_rows(logits, g[class_bias : class_bias + wide])
    np.dot(hidden.T, both, matrix(g, level_kernel, width, LEVELS))
    sum_rows(both, g[level_bias : level_bias + LEVELS])


@njit(**HELPER)
def noise_and_divide(g, noise, expected):
    """Sum and noise in double precision, then rounded."""
    for i in range(noise.size):
        g[i] = np.float32((np.float64(g[i]) + noise[i]) / expected)


def _clipped_sum(stamp: int) -> Any:
    def clipped_sum(
        blocks, heads, mean, inverse, drop, keep, one, two, content, path, level, score, rows, keys, clip, limit,
        memory, places, at, tail_size,
    ):  # fmt: skip
        """``PrivateTail.clipped_sum``; ``private_kernel`` says what the arguments are."""
        made_with = stamp
        if rows.size == 0 or made_with < 0:
            memory[places[G] : places[G] + tail_size] = np.float32(0.0)
        else:
            sum_batch(
                blocks, heads, mean, inverse, drop, keep, one, two, content, path, level, score, rows, keys, clip, limit,
                memory, places, at, tail_size,
            )  # fmt: skip

    return clipped_sum


def _noised_step(stamp: int) -> Any:
    def noised_step(noise, expected, size, mu, momentum, adam, memory, places):
        """``PrivateTail.noised_step`` on W, by the sum in G; nothing where the stamp is not one."""
        made_with = stamp
        w, g = memory[places[W] : places[W] + noise.size], memory[places[G] : places[G] + noise.size]
        noise_and_divide(g, noise, expected)
        if made_with >= 0:
            update(w, g, memory[places[STATE] : places[STATE + 1]], size, mu, momentum, adam)

    return noised_step


class Dispatchers(NamedTuple):
    """Functions of this file, with the one signature that each is compiled for."""

    clipped_sum: Any
    noised_step: Any

    def compile(self) -> None:
        """Load all from the cache, or compile and cache them (seconds)."""
        for function, signature in zip(self, SIGNATURES, strict=True):
            function.compile(signature)
            function.disable_compile()


_FLOATS, _ROWS, _INTS = compiled.given(types.float32, 1), compiled.given(types.float32, 2), compiled.given(types.int64, 1)
_TABLE, _KEYS = compiled.given(types.int64, 2), compiled.given(types.uint64, 1)
_MADE = types.Array(types.float32, 1, "C")

SIGNATURES = (
    types.void(
        _TABLE, _TABLE, _FLOATS, _FLOATS, _KEYS, _FLOATS, _ROWS, _ROWS, _INTS, _INTS, _FLOATS, _FLOATS,
        compiled.given(types.int32, 1), _KEYS, types.float64, types.int64, _MADE, _INTS, _TABLE, types.int64,
    ),
    types.void(
        compiled.given(types.float64, 1), types.float64, types.float32, types.float32, types.float32, types.boolean, _MADE, _INTS,
    ),
)  # fmt: skip


def dispatchers(*, cache: bool) -> Dispatchers:
    """Numba functions that are not compiled yet.

    Raises:
        RuntimeError: ``cache`` and there is no folder that the cache could be written to.
    """
    stamp = int.from_bytes(hashlib.sha256(Path(compiled.__file__).read_bytes()).digest()[:4], "big")
    functions = (_clipped_sum(stamp), _noised_step(stamp))
    return Dispatchers(*(njit(cache=cache, **WHOLE)(function) for function in functions))
