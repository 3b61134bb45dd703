"""The matrix products of one learner's local training and nothing else: what no engine on this BLAS can be faster than.

The products have the shapes of the tail's forward pass, of its input gradients where one is needed (not below the first
trained layer), of its weight gradients, and of the frozen trunk once over all rows. Batches have their true sizes: the last
one of 100 samples has 4, without padding. Operands are in memory, results go to buffers that exist, BLAS runs on one thread.

Heads can be multiplied one by one, or side by side as one matrix; and NumPy and Numba (SciPy) each bring their own
OpenBLAS. The limit is the fastest of what is available.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import numpy as np

from aivo_core.network import CONTENT_HEAD, DIFFICULTY_HEAD, PATH_HEAD, NetworkSpec


class Product(NamedTuple):
    """One matrix product, (rows, inner) @ (inner, columns); ``transposed`` names the operand that lies transposed in memory."""

    rows: int
    inner: int
    columns: int
    transposed: str = ""


LEARNERS = 20


def limit_seconds(*, objective: str, samples: int, epochs: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of the products of one learner: ``seconds`` the least, ``by_library`` each, and ``gflop``.

    Args:
        objective: ``first_pass`` (every row has all heads) or ``product`` (two rows per sample through the tail; content and
            path read the first one, difficulty both).
    """
    spec = NetworkSpec()
    arrangements = {
        kind: learner_products(
            spec, objective=objective, samples=samples, epochs=epochs, batch_size=batch_size, joined=kind == "joined"
        )
        for kind in ("apart", "joined")
    }
    by_library = {
        f"{library}, heads {kind}": _seconds(runner, products, repeats)
        for kind, products in arrangements.items()
        for library, runner in _runners().items()
    }
    return {
        "seconds": min(by_library.values()),
        "by_library": by_library,
        "gflop": sum(2.0 * p.rows * p.inner * p.columns for p in arrangements["apart"]) / 1e9,
    }


def learner_products(
    spec: NetworkSpec, *, objective: str, samples: int, epochs: int, batch_size: int, joined: bool
) -> list[Product]:
    """All products of one learner in order."""
    both = objective == "product"
    passes = 2 if both else 1
    widths = (spec.input_dim, *spec.hidden_layers)
    trunk = [Product(passes * samples, widths[i], widths[i + 1]) for i in range(spec.frozen_blocks)]
    batches = [min(batch_size, samples - start) for start in range(0, samples, batch_size)]
    tail: list[Product] = []
    for rows in batches:
        for layer in range(spec.frozen_blocks, len(spec.hidden_layers)):
            tail += _layer(passes * rows, widths[layer], widths[layer + 1], input_gradient=layer > spec.frozen_blocks)
        for head_rows, units in _heads(spec, rows, passes, joined):
            tail += _layer(head_rows, widths[-1], units, input_gradient=True)
    return trunk + tail * epochs


def _heads(spec: NetworkSpec, rows: int, passes: int, joined: bool) -> list[tuple[int, int]]:
    units = {head.name: head.units for head in spec.heads}
    first = [units[CONTENT_HEAD], units[PATH_HEAD]]
    if passes == 1:
        everything = [*first, units[DIFFICULTY_HEAD]]
        return [(rows, sum(everything))] if joined else [(rows, width) for width in everything]
    read_first = [(rows, sum(first))] if joined else [(rows, width) for width in first]
    return [*read_first, (passes * rows, units[DIFFICULTY_HEAD])]


def _layer(rows: int, inner: int, columns: int, *, input_gradient: bool) -> list[Product]:
    """Forward, weight gradient, and where it is needed the input gradient."""
    products = [Product(rows, inner, columns), Product(inner, rows, columns, "left")]
    return [*products, Product(rows, columns, inner, "right")] if input_gradient else products


def _operands(product: Product, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Both operands and the buffer for the result."""
    rows, inner, columns, transposed = product
    left = _normal(rng, inner, rows).T if transposed == "left" else _normal(rng, rows, inner)
    right = _normal(rng, columns, inner).T if transposed == "right" else _normal(rng, inner, columns)
    return left, right, np.empty((rows, columns), dtype=np.float32)


def _normal(rng: np.random.Generator, rows: int, columns: int) -> Any:
    return rng.normal(size=(rows, columns)).astype(np.float32)


def _seconds(runner: Any, products: list[Product], repeats: int) -> float:
    rng = np.random.default_rng(0)
    operands = {product: _operands(product, rng) for product in set(products)}
    call = runner([operands[product] for product in products])
    call()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        for _ in range(LEARNERS):
            call()
        found.append((time.process_time() - started) / LEARNERS)
    return statistics.median(found)


def _runners() -> dict[str, Any]:
    runners = {"numpy": _with_numpy}
    try:
        import numba  # noqa: F401
    except ImportError:
        return runners
    return {**runners, "numba": _with_numba}


def _with_numpy(operands: list[tuple[Any, Any, Any]]) -> Any:
    def call() -> None:
        for left, right, out in operands:
            np.dot(left, right, out=out)

    return call


def _with_numba(operands: list[tuple[Any, Any, Any]]) -> Any:
    """One compiled loop per memory layout, so that hardly any of the time is Python's."""
    import numba

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
    def many(lefts: Any, rights: Any, outs: Any) -> None:
        for number in range(len(lefts)):
            np.dot(lefts[number], rights[number], outs[number])

    layouts: dict[tuple[bool, bool], list[tuple[Any, Any, Any]]] = {}
    for left, right, out in operands:
        layouts.setdefault((left.flags.c_contiguous, right.flags.c_contiguous), []).append((left, right, out))
    typed = [tuple(numba.typed.List(column) for column in zip(*group, strict=True)) for group in layouts.values()]

    def call() -> None:
        for lefts, rights, outs in typed:
            many(lefts, rights, outs)

    return call
