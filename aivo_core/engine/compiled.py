"""One learner's local training as one compiled function: the same objective and steps as ``aivo_core.engine.reference``.

Everything that is compiled is in this file: Numba's cache looks at this file alone to see whether it is stale, and takes
constants of other modules as they were when it compiled. Nothing here checks a shape or an index; ``compiled_kernel`` does
before it calls. No fast-math flag lets the compiler assume that numbers are finite, so that NaN goes through to the result.

Loops are kept to a few arrays each: the compiler vectorises a loop only while it can afford to check that its arrays do
not overlap.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types

FAST = {"contract", "reassoc", "arcp", "afn", "nsz"}
HELPER: dict[str, Any] = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
EXACT: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}

# Places in the working memory, in the order of the table that ``compiled_kernel`` makes.
W, G, M, V, ANCHOR, FIRST, SECOND, X, CLASS_LOGITS, LEVEL_LOGITS, UP, UP_BACK, UP_CLASS, SLOPE, SHIFT, BLOCKS = range(16)
PLACES = 16
TRUNK_ROWS = 256
UPDATE_BLOCK = 2048

BETA_1_REST = np.float32(0.1)
BETA_2_REST = np.float32(0.001)
EPSILON = np.float32(1e-7)
LOWEST = np.float32(1e-6)
HIGHEST = np.float32(1.0 - 1e-6)
LEVELS = 10

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
LAYERS = np.uint64(256)

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
SMALLEST = np.float32(-87.0)


@njit(**EXACT)
def exponential(x):
    """exp of a float32 that is at most 0, to 2 units in the last place (Cephes, Moshier 1992, expf); NaN stays NaN."""
    clamped = SMALLEST if not x > SMALLEST else x
    n = np.float32(math.floor(clamped * LOG2_E + np.float32(0.5)))
    r = clamped - n * LN2_HIGH
    r = r - n * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1.0)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * power if x == x else x


@njit(**HELPER)
def matrix(memory, start, rows, columns):
    return memory[start : start + rows * columns].reshape((rows, columns))


@njit(**HELPER)
def mix(z):
    z = (z ^ (z >> np.uint64(30))) * FIRST_FACTOR
    z = (z ^ (z >> np.uint64(27))) * SECOND_FACTOR
    return z ^ (z >> np.uint64(31))


@njit(**HELPER)
def layer_key(key, step, layer):
    return mix(key + GOLDEN * (np.uint64(step) * LAYERS + np.uint64(layer) + np.uint64(1)))


@njit(**HELPER)
def fill_kept(kept, key, threshold, scale):
    """Multipliers of one layer's outputs: ``generator.uniform_words`` below ``threshold`` give 0, the others ``scale``."""
    half = (kept.size + 1) // 2
    low, high = kept[:half], kept[half:]
    zero = np.float32(0.0)
    for i in range(high.size):
        z = mix(key + GOLDEN * np.uint64(i + 1))
        low[i] = scale if (z & np.uint64(0xFFFFFFFF)) >= threshold else zero
        high[i] = scale if (z >> np.uint64(32)) >= threshold else zero
    if high.size < half:
        z = mix(key + GOLDEN * np.uint64(half))
        low[half - 1] = scale if (z & np.uint64(0xFFFFFFFF)) >= threshold else zero


@njit(**HELPER)
def rectify(values, bias):
    for i in range(values.shape[0]):
        row = values[i]
        for j in range(bias.size):
            h = row[j] + bias[j]
            row[j] = np.float32(0.0) if h < np.float32(0.0) else h


@njit(**HELPER)
def normalise(output, hidden, scale, shift):
    for i in range(hidden.shape[0]):
        out, row = output[i], hidden[i]
        for j in range(scale.size):
            out[j] = row[j] * scale[j] + shift[j]


@njit(**HELPER)
def multiply(values, factors):
    for i in range(values.size):
        values[i] *= factors[i]


@njit(**HELPER)
def run_trunk(x, out, trunk, table, scale, shift, here, there):
    """The folded trunk, TRUNK_ROWS rows at a time: (n, input_dim) -> (n, feature_dim) in ``out``."""
    for begin in range(0, x.shape[0], TRUNK_ROWS):
        end = min(begin + TRUNK_ROWS, x.shape[0])
        if table.shape[0] == 0:
            for i in range(begin, end):
                for j in range(scale.size):
                    out[i, j] = x[i, j]
            continue
        source = matrix(here, 0, end - begin, table[0, 1])
        np.dot(x[begin:end], matrix(trunk, table[0, 2], table[0, 0], table[0, 1]), source)
        rectify(source, trunk[table[0, 3] : table[0, 3] + table[0, 1]])
        for layer in range(1, table.shape[0]):
            target = matrix(there, 0, end - begin, table[layer, 1])
            np.dot(source, matrix(trunk, table[layer, 2], table[layer, 0], table[layer, 1]), target)
            rectify(target, trunk[table[layer, 3] : table[layer, 3] + table[layer, 1]])
            here, there = there, here
            source = target
        normalise(out[begin:end], source, scale, shift)


@njit(**HELPER)
def pack(flat, packed, heads, width, hidden):
    """Copy a tail into the order of training: hidden blocks, content and path heads side by side, difficulty head."""
    for i in range(hidden):
        packed[i] = flat[i]
    columns = heads[0, 0] + heads[1, 0]
    to = hidden
    for row in range(width + 1):  # the last is the biases
        for head in range(2):
            units = heads[head, 0]
            start = heads[head, 1] + row * units if row < width else heads[head, 2]
            for j in range(units):
                packed[to + j] = flat[start + j]
            to += units
    for i in range(width * heads[2, 0]):
        packed[to + i] = flat[heads[2, 1] + i]
    to += width * heads[2, 0]
    for j in range(heads[2, 0]):
        packed[to + j] = flat[heads[2, 2] + j]
    return columns


@njit(**HELPER)
def unpack(packed, flat, heads, width, hidden):
    """The inverse of ``pack``."""
    for i in range(hidden):
        flat[i] = packed[i]
    at = hidden
    for row in range(width + 1):
        for head in range(2):
            units = heads[head, 0]
            start = heads[head, 1] + row * units if row < width else heads[head, 2]
            for j in range(units):
                flat[start + j] = packed[at + j]
            at += units
    for i in range(width * heads[2, 0]):
        flat[heads[2, 1] + i] = packed[at + i]
    at += width * heads[2, 0]
    for j in range(heads[2, 0]):
        flat[heads[2, 2] + j] = packed[at + j]


@njit(**HELPER)
def gather(target, source, rows, count):
    for i in range(count):
        to, row = target[i], source[rows[i]]
        for j in range(to.size):
            to[j] = row[j]


@njit(**HELPER)
def forward(x, w, blocks, mean, inverse, drop, keep, key, step, memory, places, at, first_block):
    """Hidden blocks from ``first_block`` on, on the rows of x; gives the last one's output. Places of block b in
    ``at``: hidden, kept, output."""
    rows = x.shape[0]
    statistics = 0
    for block in range(first_block):
        statistics += blocks[block, 1]
    for block in range(first_block, blocks.shape[0]):
        units = blocks[block, 1]
        hidden = matrix(memory, at[block, 0], rows, units)
        np.dot(x, matrix(w, blocks[block, 2], blocks[block, 0], units), hidden)
        rectify(hidden, w[blocks[block, 3] : blocks[block, 3] + units])
        output = matrix(memory, at[block, 2], rows, units)
        normalise_block(hidden, output, w, blocks[block], mean, inverse, statistics, memory, places)
        drop_out(output, block, drop, keep, key, step, memory, at)
        statistics += units
        x = output
    return x


@njit(**HELPER)
def normalise_block(hidden, output, w, block, mean, inverse, statistics, memory, places):
    units = block[1]
    scale = memory[places[SLOPE] : places[SLOPE] + units]
    shift = memory[places[SHIFT] : places[SHIFT] + units]
    for j in range(units):
        scale[j] = w[block[4] + j] * inverse[statistics + j]
        shift[j] = w[block[5] + j] - mean[statistics + j] * scale[j]
    normalise(output, hidden, scale, shift)


@njit(**HELPER)
def drop_out(output, block, drop, keep, key, step, memory, at):
    if drop[block] > np.uint64(0):
        kept = memory[at[block, 1] : at[block, 1] + output.size]
        fill_kept(kept, layer_key(key, step, block), drop[block], keep[block])
        multiply(output.reshape(output.size), kept)


@njit(**HELPER)
def backward(x, w, g, blocks, mean, inverse, drop, memory, places, at, rows):
    """Gradients of the hidden blocks into g; what comes down from the heads is in UP."""
    statistics = mean.size
    here, there = places[UP], places[UP_BACK]
    for block in range(blocks.shape[0] - 1, -1, -1):
        units = blocks[block, 1]
        statistics -= units
        up = matrix(memory, here, rows, units)
        if drop[block] > np.uint64(0):
            multiply(up.reshape(up.size), memory[at[block, 1] : at[block, 1] + rows * units])
        backward_block(
            up, matrix(memory, at[block, 0], rows, units), w, g, blocks[block], mean, inverse, statistics, memory, places
        )
        gradient = matrix(g, blocks[block, 2], blocks[block, 0], units)
        if block == 0:
            np.dot(x.T, up, gradient)
        else:
            below = matrix(memory, at[block - 1, 2], rows, blocks[block, 0])
            np.dot(below.T, up, gradient)
            np.dot(up, matrix(w, blocks[block, 2], blocks[block, 0], units).T, matrix(memory, there, rows, blocks[block, 0]))
            here, there = there, here


@njit(**HELPER)
def backward_block(up, hidden, w, g, block, mean, inverse, statistics, memory, places):
    """Through normalisation and ReLU: gradients of gamma, beta and bias; ``up`` becomes the gradient by the product."""
    units = block[1]
    slope = memory[places[SLOPE] : places[SLOPE] + units]
    bias, gamma = g[block[3] : block[3] + units], g[block[4] : block[4] + units]
    beta, centre = g[block[5] : block[5] + units], mean[statistics : statistics + units]
    for j in range(units):
        slope[j] = w[block[4] + j] * inverse[statistics + j]
        bias[j] = gamma[j] = beta[j] = np.float32(0.0)
    for i in range(up.shape[0]):
        add_normalisation(up[i], hidden[i], beta, gamma, centre)
        through_rectifier(up[i], hidden[i], slope, bias)
    for j in range(units):
        gamma[j] *= inverse[statistics + j]


@njit(**HELPER)
def add_normalisation(up, hidden, beta, gamma, centre):
    for j in range(centre.size):
        beta[j] += up[j]
        gamma[j] += up[j] * (hidden[j] - centre[j])


@njit(**HELPER)
def through_rectifier(up, hidden, slope, bias):
    for j in range(slope.size):
        d = up[j] * slope[j] if hidden[j] > np.float32(0.0) else np.float32(0.0)
        bias[j] += d
        up[j] = d


@njit(**HELPER)
def softmax(row):
    """In place; gives the logarithm of the sum and the largest, whose sum is the normaliser in logarithms."""
    top = row[0]
    for j in range(1, row.size):
        top = row[j] if row[j] > top else top
    total = np.float32(0.0)
    for j in range(row.size):
        e = exponential(row[j] - top)
        row[j] = e
        total += e
    share = np.float32(1.0) / total
    for j in range(row.size):
        row[j] *= share
    return math.log(total) + top


@njit(**HELPER)
def class_rows(logits, first, units, bias, labels, rows, count, factor):
    """Cross entropy of ``units`` columns from ``first`` on; logits become factor times its gradient. Sum of losses."""
    loss = 0.0
    for i in range(count):
        row = logits[i, first : first + units]
        for j in range(units):
            row[j] += bias[j]
        label = labels[rows[i]]
        own = row[label]
        loss += softmax(row) - own
        row[label] -= np.float32(1.0)
        for j in range(units):
            row[j] *= factor
    return loss


@njit(**HELPER)
def level_rows(logits, bias, level, score, rows, count, factor):
    """Ordinal loss (``aivo_core.ordinal``), rows beyond ``count`` being the second pass; as ``class_rows``."""
    loss = 0.0
    one = np.float32(1.0)
    for i in range(logits.shape[0]):
        row = logits[i]
        for j in range(LEVELS):
            row[j] += bias[j]
        softmax(row)
        sample = rows[i] if i < count else rows[i - count]
        success = np.float32(0.0)
        for j in range(LEVELS):
            success += row[j] * allowed(j, level[sample])
        right = score[sample]
        chance = LOWEST if success < LOWEST else (HIGHEST if success > HIGHEST else success)
        loss -= right * math.log(chance) + (one - right) * math.log1p(-chance)
        slope = (one - right) / (one - chance) - right / chance
        if success < LOWEST or success > HIGHEST:
            slope = np.float32(0.0)
        slope *= factor
        for j in range(LEVELS):
            row[j] = row[j] * (allowed(j, level[sample]) - success) * slope
    return loss


@njit(**HELPER)
def allowed(j, level):
    a = np.float32(j + 1) - level
    a = np.float32(0.0) if a < np.float32(0.0) else a
    return np.float32(1.0) if a > np.float32(1.0) else a


@njit(**HELPER)
def sum_rows(matrix_, out):
    for j in range(out.size):
        out[j] = np.float32(0.0)
    for i in range(matrix_.shape[0]):
        row = matrix_[i]
        for j in range(out.size):
            out[j] += row[j]


@njit(**HELPER)
def add(values, more):
    for i in range(more.size):
        values[i] += more[i]


@njit(**HELPER)
def pull(g, w, anchor, mu):
    """Add the proximal term's gradient; gives the squared distance from the anchor."""
    distance = np.float32(0.0)
    for i in range(g.size):
        d = w[i] - anchor[i]
        g[i] += mu * d
        distance += d * d
    return distance


@njit(**HELPER)
def adam_block(w, m, v, g, size):
    for i in range(w.size):
        m[i] += (g[i] - m[i]) * BETA_1_REST
        v[i] += (g[i] * g[i] - v[i]) * BETA_2_REST
        w[i] -= m[i] * size / (math.sqrt(v[i]) + EPSILON)


@njit(**HELPER)
def sgd_block(w, m, g, size, momentum):
    for i in range(w.size):
        m[i] = m[i] * momentum - g[i] * size
        w[i] += m[i]


@njit(**HELPER)
def update(w, g, m, v, anchor, size, mu, momentum, adam):
    """One optimiser step, block by block so that each is read from memory once; the proximal term before it."""
    distance = 0.0
    for begin in range(0, w.size, UPDATE_BLOCK):
        end = min(begin + UPDATE_BLOCK, w.size)
        if mu > np.float32(0.0):
            distance += pull(g[begin:end], w[begin:end], anchor[begin:end], mu)
        if adam:
            adam_block(w[begin:end], m[begin:end], v[begin:end], g[begin:end], size)
        else:
            sgd_block(w[begin:end], m[begin:end], g[begin:end], size, momentum)
    return 0.5 * mu * distance


@njit(**HELPER)
def heads_step(hidden, rows, count, content, path, level, score, heads, width, start, w, g, memory, places, product):
    """Losses of the three heads over a batch, their gradients into g, what goes down into UP; the mean objective."""
    wide = heads[0, 0] + heads[1, 0]
    class_bias, level_kernel = start + width * wide, start + (width + 1) * wide
    level_bias = level_kernel + width * LEVELS
    share = np.float32(1.0) / np.float32(count)

    logits = matrix(memory, places[CLASS_LOGITS], count, wide)
    np.dot(hidden[:count], matrix(w, start, width, wide), logits)
    bias = w[class_bias : class_bias + wide]
    loss = class_rows(logits, 0, heads[0, 0], bias[: heads[0, 0]], content, rows, count, share)
    loss += class_rows(logits, heads[0, 0], heads[1, 0], bias[heads[0, 0] :], path, rows, count, share)
    np.dot(hidden[:count].T, logits, matrix(g, start, width, wide))
    sum_rows(logits, g[class_bias : class_bias + wide])

    both = matrix(memory, places[LEVEL_LOGITS], hidden.shape[0], LEVELS)
    np.dot(hidden, matrix(w, level_kernel, width, LEVELS), both)
    if product:
        half = np.float32(0.5)
        loss += 0.5 * level_rows(both, w[level_bias : level_bias + LEVELS], level, score, rows, count, half * share)
    else:
        classes = level.astype(np.int64)
        for i in range(classes.size):
            classes[i] = min(classes[i], LEVELS - 1)
        loss += class_rows(both, 0, LEVELS, w[level_bias : level_bias + LEVELS], classes, rows, count, share)
    np.dot(hidden.T, both, matrix(g, level_kernel, width, LEVELS))
    sum_rows(both, g[level_bias : level_bias + LEVELS])

    np.dot(both, matrix(w, level_kernel, width, LEVELS).T, matrix(memory, places[UP], hidden.shape[0], width))
    np.dot(logits, matrix(w, start, width, wide).T, matrix(memory, places[UP_CLASS], count, width))
    add(memory[places[UP] : places[UP] + count * width], memory[places[UP_CLASS] : places[UP_CLASS] + count * width])
    return loss / count


def train_learner(
    trunk, trunk_table, feature_scale, feature_shift, blocks, heads, mean, inverse, drop, keep,
    first, second, content, path, level, score, start_tail, anchor_tail,
    index, counts, sizes, key, bias_index, bias_counts, bias_sizes, bias_key,
    mu, momentum, adam, product,
    memory, places, at, tail, after_tail_pass, losses, bias_losses,
):  # fmt: skip
    """Both passes of one learner; ``compiled_kernel`` says what the arguments are. Results go into the last four."""
    samples, features = first.shape[0], feature_scale.size
    width = blocks[blocks.shape[0] - 1, 1] if blocks.shape[0] else features
    size = start_tail.size
    start = heads[0, 1]
    for head in range(1, 3):
        start = min(start, heads[head, 1])
    w, g = memory[places[W] : places[W] + size], memory[places[G] : places[G] + size]
    m, v = memory[places[M] : places[M] + size], memory[places[V] : places[V] + size]
    anchor = memory[places[ANCHOR] : places[ANCHOR] + size]
    pack(start_tail, w, heads, width, start)
    pack(anchor_tail, anchor, heads, width, start)
    for i in range(size):
        m[i] = v[i] = np.float32(0.0)

    one, two = matrix(memory, places[FIRST], samples, features), matrix(memory, places[SECOND], samples, features)
    here, there = memory[places[BLOCKS] :], memory[places[BLOCKS] + (places[PLACES] - places[BLOCKS]) // 2 :]
    if counts.size > 0:
        run_trunk(first, one, trunk, trunk_table, feature_scale, feature_shift, here, there)
    if product or bias_counts.size > 0:
        run_trunk(second, two, trunk, trunk_table, feature_scale, feature_shift, here, there)

    for step in range(counts.size):
        count = counts[step]
        rows = 2 * count if product else count
        x = matrix(memory, places[X], rows, features)
        gather(x[:count], one, index[step], count)
        if product:
            gather(x[count:], two, index[step], count)
        hidden = forward(x, w, blocks, mean, inverse, drop, keep, key, step, memory, places, at, 0)
        loss = heads_step(
            hidden, index[step], count, content, path, level, score, heads, width, start, w, g, memory, places, product
        )
        backward(x, w, g, blocks, mean, inverse, drop, memory, places, at, rows)
        loss += update(w, g, m, v, anchor, sizes[step], mu, momentum, adam)
        losses[step] = loss
    unpack(w, after_tail_pass, heads, width, start)

    wide = heads[0, 0] + heads[1, 0]
    level_kernel = start + (width + 1) * wide
    level_bias = level_kernel + width * LEVELS
    bias, slope = w[level_bias : level_bias + LEVELS], g[:LEVELS]
    bias_m, bias_v = m[:LEVELS], v[:LEVELS]
    for j in range(LEVELS):
        bias_m[j] = bias_v[j] = np.float32(0.0)
    for step in range(bias_counts.size):
        count = bias_counts[step]
        x = matrix(memory, places[X], count, features)
        gather(x, two, bias_index[step], count)
        hidden = forward(x, w, blocks, mean, inverse, drop, keep, bias_key, step, memory, places, at, 0)
        logits = matrix(memory, places[LEVEL_LOGITS], count, LEVELS)
        np.dot(hidden, matrix(w, level_kernel, width, LEVELS), logits)
        share = np.float32(1.0) / np.float32(count)
        bias_losses[step] = level_rows(logits, bias, level, score, bias_index[step], count, share) / count
        sum_rows(logits, slope)
        adam_block(bias, bias_m, bias_v, slope, bias_sizes[step])
    unpack(w, tail, heads, width, start)


def _given(dtype: Any, dimensions: int) -> Any:
    """A C-contiguous array that is read only: callers' arrays may be read-only ones."""
    return types.Array(dtype, dimensions, "C", readonly=True)


_FLOATS, _ROWS = _given(types.float32, 1), _given(types.float32, 2)
_INTS, _TABLE, _INDEX = _given(types.int64, 1), _given(types.int64, 2), _given(types.int32, 2)
_MADE = types.Array(types.float32, 1, "C")

SIGNATURE = types.void(
    _FLOATS, _TABLE, _FLOATS, _FLOATS, _TABLE, _TABLE, _FLOATS, _FLOATS, _given(types.uint64, 1), _FLOATS,
    _ROWS, _ROWS, _INTS, _INTS, _FLOATS, _FLOATS, _FLOATS, _FLOATS,
    _INDEX, _INTS, _FLOATS, types.uint64, _INDEX, _INTS, _FLOATS, types.uint64,
    types.float32, types.float32, types.boolean, types.boolean,
    _MADE, _INTS, _TABLE, _MADE, _MADE, _MADE, _MADE,
)  # fmt: skip


def dispatcher(*, cache: bool) -> Any:
    """``train_learner`` as a Numba function that is not compiled yet.

    Raises:
        RuntimeError: ``cache`` and there is no folder that the cache could be written to.
    """
    return njit(cache=cache, **HELPER)(train_learner)
