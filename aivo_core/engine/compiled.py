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
WHOLE: dict[str, Any] = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
HELPER: dict[str, Any] = {**WHOLE, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # a fifth less to compile
EXACT: dict[str, Any] = {**HELPER, "fastmath": {"contract"}}

# Places in the working memory, in the order of the table that ``compiled_kernel`` makes.
W, G, STATE, FIRST, SECOND, X, X_BLOCKS, CLASS_LOGITS, LEVEL_LOGITS, UP, UP_BACK, UP_CLASS, SLOPE, SHIFT, BLOCKS = range(15)
PLACES = 15
TRUNK_ROWS = 240
STATE_BLOCK = 2048
"""The optimiser's state is cut into blocks: first moments, second moments and anchor of so many weights each."""

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
def at_once(wanted, rest, limit, step):
    """Rows of a product to compute at once so that it stays within ``limit`` multiplications: a multiple of ``step``."""
    if wanted * rest <= limit or limit < step * rest:
        return wanted
    return limit // rest // step * step


@njit(**HELPER)
def product(left, right, out, limit):
    """Matrix product, some rows at a time where the library has a faster way for small ones (``blas.small_product``)."""
    rows = at_once(left.shape[0], right.size, limit, 2)
    for begin in range(0, left.shape[0], rows):
        end = min(begin + rows, left.shape[0])
        np.dot(left[begin:end], right, out[begin:end])


@njit(**HELPER)
def rectify(values, bias):
    for i in range(values.shape[0]):
        row = values[i]
        for j in range(bias.size):
            h = row[j] + bias[j]
            row[j] = np.float32(0.0) if h < np.float32(0.0) else h


@njit(**HELPER)
def activate(hidden, output, bias, scale, shift):
    """Bias and ReLU in place, then the normalisation of it into ``output``."""
    for i in range(hidden.shape[0]):
        row, out = hidden[i], output[i]
        for j in range(bias.size):
            h = row[j] + bias[j]
            h = np.float32(0.0) if h < np.float32(0.0) else h
            row[j] = h
            out[j] = h * scale[j] + shift[j]


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
def run_trunk(x, out, trunk, table, scale, shift, here, there, limit):
    """The folded trunk, TRUNK_ROWS rows at a time: (n, input_dim) -> (n, feature_dim) in ``out``."""
    for begin in range(0, x.shape[0], TRUNK_ROWS):
        end = min(begin + TRUNK_ROWS, x.shape[0])
        if table.shape[0] == 0:
            for i in range(begin, end):
                for j in range(scale.size):
                    out[i, j] = x[i, j]
            continue
        source = matrix(here, 0, end - begin, table[0, 1])
        product(x[begin:end], matrix(trunk, table[0, 2], table[0, 0], table[0, 1]), source, limit)
        rectify(source, trunk[table[0, 3] : table[0, 3] + table[0, 1]])
        for layer in range(1, table.shape[0]):
            target = matrix(there, 0, end - begin, table[layer, 1])
            product(source, matrix(trunk, table[layer, 2], table[layer, 0], table[layer, 1]), target, limit)
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
def copy_columns(x, blocks, columns):
    """Copy ``columns`` columns of x after the other, each part contiguous."""
    at = 0
    for begin in range(0, x.shape[1], columns):
        end = min(begin + columns, x.shape[1])
        for i in range(x.shape[0]):
            row = x[i, begin:end]
            for j in range(row.size):
                blocks[at + j] = row[j]
            at += row.size


@njit(**HELPER)
def forward(x, w, blocks, mean, inverse, drop, keep, key, step, memory, places, at, limit):
    """Hidden blocks on the rows of x; gives the last one's output. Places of block b in ``at``: hidden, kept, output."""
    rows = x.shape[0]
    statistics = 0
    for block in range(blocks.shape[0]):
        units = blocks[block, 1]
        hidden = matrix(memory, at[block, 0], rows, units)
        product(x, matrix(w, blocks[block, 2], blocks[block, 0], units), hidden, limit)
        output = matrix(memory, at[block, 2], rows, units)
        activate_block(hidden, output, w, blocks[block], mean, inverse, statistics, memory, places)
        drop_out(output, block, drop, keep, key, step, memory, at)
        statistics += units
        x = output
    return x


@njit(**HELPER)
def activate_block(hidden, output, w, block, mean, inverse, statistics, memory, places):
    units = block[1]
    scale = memory[places[SLOPE] : places[SLOPE] + units]
    shift = memory[places[SHIFT] : places[SHIFT] + units]
    for j in range(units):
        scale[j] = w[block[4] + j] * inverse[statistics + j]
        shift[j] = w[block[5] + j] - mean[statistics + j] * scale[j]
    activate(hidden, output, w[block[3] : block[3] + units], scale, shift)


@njit(**HELPER)
def drop_out(output, block, drop, keep, key, step, memory, at):
    if drop[block] > np.uint64(0):
        kept = memory[at[block, 1] : at[block, 1] + output.size]
        fill_kept(kept, layer_key(key, step, block), drop[block], keep[block])
        multiply(output.reshape(output.size), kept)


@njit(**HELPER)
def backward(x, w, g, blocks, mean, inverse, drop, memory, places, at, limit):
    """Gradients of the hidden blocks into g; what comes down from the heads is in UP."""
    rows, statistics = x.shape[0], mean.size
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
            first_gradient(x, up, gradient, memory[places[X_BLOCKS] :], limit)
        else:
            below = matrix(memory, at[block - 1, 2], rows, blocks[block, 0])
            np.dot(below.T, up, gradient)
            np.dot(up, matrix(w, blocks[block, 2], blocks[block, 0], units).T, matrix(memory, there, rows, blocks[block, 0]))
            here, there = there, here


@njit(**HELPER)
def first_gradient(x, up, gradient, parts, limit):
    """Kernel gradient of the first trained layer, some columns of x at a time as in ``product``."""
    columns = at_once(x.shape[1], up.size, limit, 16)
    if columns == x.shape[1]:
        np.dot(x.T, up, gradient)
        return
    copy_columns(x, parts, columns)
    for begin in range(0, x.shape[1], columns):
        end = min(begin + columns, x.shape[1])
        np.dot(matrix(parts, begin * x.shape[0], x.shape[0], end - begin).T, up, gradient[begin:end])


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
def in_order(bits):
    """Integers in the order of the floats whose bits they are; its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(**HELPER)
def largest(row):
    """Largest number of a row, by integers: a maximum of floats that keeps NaN in mind is not vectorised."""
    bits = row.view(np.int32)
    top = in_order(bits[0])
    for j in range(1, bits.size):
        one = in_order(bits[j])
        top = one if one > top else top
    return np.int32(in_order(top)).view(np.float32)


@njit(**HELPER)
def shift_to_zero(row, bias):
    """Add the biases, then take off the largest."""
    for j in range(bias.size):
        row[j] += bias[j]
    top = largest(row)
    for j in range(bias.size):
        row[j] -= top


@njit(**HELPER)
def exponentials(row):
    """In place, of numbers that are at most 0; gives the sum."""
    total = np.float32(0.0)
    for j in range(row.size):
        e = exponential(row[j])
        row[j] = e
        total += e
    return total


@njit(**HELPER)
def class_rows(logits, first, units, bias, labels, rows, count, factor):
    """Cross entropy of ``units`` columns from ``first`` on; logits become factor times its gradient. Sum of losses."""
    loss = 0.0
    for i in range(count):
        row = logits[i, first : first + units]
        shift_to_zero(row, bias)
        label = labels[rows[i]]
        own = row[label]
        total = exponentials(row)
        loss += math.log(total) - own
        share = factor / total
        for j in range(units):
            row[j] *= share
        row[label] -= factor
    return loss


@njit(**HELPER)
def level_rows(logits, bias, level, score, rows, count, factor):
    """Ordinal loss (``aivo_core.ordinal``), rows beyond ``count`` being the second pass; as ``class_rows``."""
    loss = 0.0
    for i in range(logits.shape[0]):
        shift_to_zero(logits[i], bias)
    exponentials(logits.reshape(logits.size))
    for i in range(logits.shape[0]):
        sample = rows[i] if i < count else rows[i - count]
        loss += level_row(logits[i], level[sample], score[sample], factor)
    return loss


@njit(**HELPER)
def level_row(row, level, right, factor):
    """From exponentials to the gradient; gives the loss."""
    one = np.float32(1.0)
    total = success = np.float32(0.0)
    for j in range(LEVELS):
        total += row[j]
        success += row[j] * allowed(j, level)
    success /= total
    chance = LOWEST if success < LOWEST else (HIGHEST if success > HIGHEST else success)
    loss = np.float32(0.0)
    if right > np.float32(0.0):
        loss -= right * math.log(chance)
    if right < one:
        loss -= (one - right) * math.log1p(-chance)
    slope = (one - right) / (one - chance) - right / chance
    if success < LOWEST or success > HIGHEST:
        slope = np.float32(0.0)
    slope *= factor / total
    for j in range(LEVELS):
        row[j] = row[j] * (allowed(j, level) - success) * slope
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
def adam_block(w, g, state, size, mu):
    """One step of Adam, epsilon where Keras has it, on at most STATE_BLOCK weights; gives the squared distance from the
    anchor before it. Moments and anchor lie a constant apart, so that they count as one array (see above)."""
    distance = np.float32(0.0)
    for i in range(w.size):
        d = w[i] - state[i + 2 * STATE_BLOCK]
        distance += d * d
        gradient = g[i] + mu * d
        m = state[i] + (gradient - state[i]) * BETA_1_REST
        v = state[i + STATE_BLOCK] + (gradient * gradient - state[i + STATE_BLOCK]) * BETA_2_REST
        state[i] = m
        state[i + STATE_BLOCK] = v
        w[i] -= m * size / (math.sqrt(v) + EPSILON)
    return distance


@njit(**HELPER)
def sgd_block(w, g, state, size, mu, momentum):
    """As ``adam_block``, by gradient descent with momentum."""
    distance = np.float32(0.0)
    for i in range(w.size):
        d = w[i] - state[i + 2 * STATE_BLOCK]
        distance += d * d
        m = state[i] * momentum - (g[i] + mu * d) * size
        state[i] = m
        w[i] += m
    return distance


@njit(**HELPER)
def update(w, g, state, size, mu, momentum, adam):
    """One optimiser step; gives the proximal term before it."""
    distance = 0.0
    for begin in range(0, w.size, STATE_BLOCK):
        end = min(begin + STATE_BLOCK, w.size)
        own = state[3 * begin : 3 * (begin + STATE_BLOCK)]
        if adam:
            distance += adam_block(w[begin:end], g[begin:end], own, size, mu)
        else:
            distance += sgd_block(w[begin:end], g[begin:end], own, size, mu, momentum)
    return 0.5 * mu * distance if mu > np.float32(0.0) else 0.0


@njit(**HELPER)
def fresh_state(state, anchor):
    """Moments of zero, and the anchor in its places."""
    for i in range(state.size):
        state[i] = np.float32(0.0)
    for begin in range(0, anchor.size, STATE_BLOCK):
        part = anchor[begin : begin + STATE_BLOCK]
        own = state[3 * begin + 2 * STATE_BLOCK :]
        for i in range(part.size):
            own[i] = part[i]


@njit(**HELPER)
def adam_small(w, g, moments, size):
    """Adam on a few weights without an anchor; ``moments`` has both."""
    for i in range(w.size):
        m = moments[i] + (g[i] - moments[i]) * BETA_1_REST
        v = moments[w.size + i] + (g[i] * g[i] - moments[w.size + i]) * BETA_2_REST
        moments[i] = m
        moments[w.size + i] = v
        w[i] -= m * size / (math.sqrt(v) + EPSILON)


@njit(**HELPER)
def heads_step(hidden, rows, count, content, path, level, score, heads, width, start, w, g, memory, places, both_passes):
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
    if both_passes:
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
    mu, momentum, adam, both_passes, limit,
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
    state = memory[places[STATE] : places[FIRST]]
    pack(start_tail, w, heads, width, start)
    pack(anchor_tail, g, heads, width, start)
    fresh_state(state, g)

    one, two = matrix(memory, places[FIRST], samples, features), matrix(memory, places[SECOND], samples, features)
    here, there = memory[places[BLOCKS] :], memory[places[BLOCKS] + (places[PLACES] - places[BLOCKS]) // 2 :]
    if counts.size > 0:
        run_trunk(first, one, trunk, trunk_table, feature_scale, feature_shift, here, there, limit)
    if both_passes or bias_counts.size > 0:
        run_trunk(second, two, trunk, trunk_table, feature_scale, feature_shift, here, there, limit)

    for step in range(counts.size):
        count = counts[step]
        rows = 2 * count if both_passes else count
        x = matrix(memory, places[X], rows, features)
        gather(x[:count], one, index[step], count)
        if both_passes:
            gather(x[count:], two, index[step], count)
        hidden = forward(x, w, blocks, mean, inverse, drop, keep, key, step, memory, places, at, limit)
        loss = heads_step(
            hidden, index[step], count, content, path, level, score, heads, width, start, w, g, memory, places, both_passes
        )
        backward(x, w, g, blocks, mean, inverse, drop, memory, places, at, limit)
        loss += update(w, g, state, sizes[step], mu, momentum, adam)
        losses[step] = loss
    unpack(w, after_tail_pass, heads, width, start)

    wide = heads[0, 0] + heads[1, 0]
    level_kernel = start + (width + 1) * wide
    level_bias = level_kernel + width * LEVELS
    bias, slope = w[level_bias : level_bias + LEVELS], g[:LEVELS]
    moments = state[: 2 * LEVELS]
    for j in range(2 * LEVELS):
        moments[j] = np.float32(0.0)
    for step in range(bias_counts.size):
        count = bias_counts[step]
        x = matrix(memory, places[X], count, features)
        gather(x, two, bias_index[step], count)
        hidden = forward(x, w, blocks, mean, inverse, drop, keep, bias_key, step, memory, places, at, limit)
        logits = matrix(memory, places[LEVEL_LOGITS], count, LEVELS)
        np.dot(hidden, matrix(w, level_kernel, width, LEVELS), logits)
        share = np.float32(1.0) / np.float32(count)
        bias_losses[step] = level_rows(logits, bias, level, score, bias_index[step], count, share) / count
        sum_rows(logits, slope)
        adam_small(bias, slope, moments, bias_sizes[step])
    unpack(w, tail, heads, width, start)


def given(dtype: Any, dimensions: int) -> Any:
    """A C-contiguous array that is read only: callers' arrays may be read-only ones."""
    return types.Array(dtype, dimensions, "C", readonly=True)


_FLOATS, _ROWS = given(types.float32, 1), given(types.float32, 2)
_INTS, _TABLE, _INDEX = given(types.int64, 1), given(types.int64, 2), given(types.int32, 2)
_MADE = types.Array(types.float32, 1, "C")

SIGNATURE = types.void(
    _FLOATS, _TABLE, _FLOATS, _FLOATS, _TABLE, _TABLE, _FLOATS, _FLOATS, given(types.uint64, 1), _FLOATS,
    _ROWS, _ROWS, _INTS, _INTS, _FLOATS, _FLOATS, _FLOATS, _FLOATS,
    _INDEX, _INTS, _FLOATS, types.uint64, _INDEX, _INTS, _FLOATS, types.uint64,
    types.float32, types.float32, types.boolean, types.boolean, types.int64,
    _MADE, _INTS, _TABLE, _MADE, _MADE, _MADE, _MADE,
)  # fmt: skip


def dispatcher(*, cache: bool) -> Any:
    """``train_learner`` as a Numba function that is not compiled yet.

    Raises:
        RuntimeError: ``cache`` and there is no folder that the cache could be written to.
    """
    return njit(cache=cache, **WHOLE)(train_learner)
