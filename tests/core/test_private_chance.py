"""Where private training takes its chance from, and which batches it makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from aivo_core.engine import compiled, compiled_chance, compiled_private, private_kernel
from aivo_core.engine.contract import SamplePrivacy
from aivo_core.engine.private import SystemChance, poisson_rows, train_privately
from aivo_core.engine.private_kernel import ChaChaChance
from aivo_core.network import FloatArray
from aivo_core.privacy import DoubleArray
from tests.core.test_cohort_engine import BASE_TAIL, task
from tests.core.test_private_training import FALSE_ALARM, PRIVATE
from tests.synthetic_samples import TINY

Chance = SystemChance | ChaChaChance


@pytest.fixture(params=[SystemChance, ChaChaChance])
def chance(request: pytest.FixtureRequest) -> Chance:
    """What the backends draw from in the product."""
    found: Chance = request.param()
    return found


# --- Batches ----------------------------------------------------------------------------------------------------------------


class Recorded:
    """A ``PrivateTail`` that notes what it is asked."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.keys: list[int] = []
        self.expected: list[int] = []
        self.sizes: list[float] = []

    def clipped_sum(self, rows: Any, keys: Any) -> None:
        assert len(rows) == len(keys)
        self.rows.append(rows.tolist())
        self.keys += keys.tolist()

    def noised_step(self, noise: DoubleArray, expected: int, size: np.float32) -> None:
        assert noise.shape == (TINY.tail_size,)
        self.expected.append(expected)
        self.sizes.append(float(size))

    def tail(self) -> FloatArray:
        return BASE_TAIL


def test_batches_are_drawn_anew_for_each_step_each_sample_on_its_own(chance: Chance) -> None:
    recorded = Recorded()
    config = replace(PRIVATE, epochs=400, batch_size=3, optimiser="sgd")
    outcome = train_privately(config, task(n=20), lambda: recorded, chance)
    steps = -(-400 * 20 // 3)
    assert outcome.steps == steps == len(recorded.rows)
    assert set(recorded.expected) == {3}
    assert len(set(recorded.keys)) == len(recorded.keys)
    low, high = scipy.stats.binom.ppf([FALSE_ALARM / 40, 1 - FALSE_ALARM / 40], steps, 3 / 20)
    taken = np.bincount(np.concatenate(recorded.rows).astype(int), minlength=20)
    assert low <= taken.min() and taken.max() <= high
    sizes = np.bincount([len(rows) for rows in recorded.rows], minlength=21)
    shares = scipy.stats.binom.pmf(np.arange(21), 20, 3 / 20)
    common = shares * steps >= 5
    seen, awaited = (np.append(values[common], values[~common].sum()) for values in (sizes, shares * steps))
    assert scipy.stats.chisquare(seen, awaited).pvalue > FALSE_ALARM
    assert sizes[0] > 0  # empty batches took their step


def test_a_batch_size_of_all_samples_or_more_takes_everyone_each_time(chance: Chance) -> None:
    for batch_size in (20, 21, 1000):
        recorded = Recorded()
        outcome = train_privately(replace(PRIVATE, epochs=3, batch_size=batch_size), task(n=20), lambda r=recorded: r, chance)
        assert recorded.rows == [list(range(20))] * 3
        assert set(recorded.expected) == {20}
        assert outcome.privacy == SamplePrivacy(3, 20, 20, 1.0, 0.5)


def test_poisson_rows_compare_whole_numbers() -> None:
    words = np.array([0, 2, 3, 5, 7], dtype=np.uint64).tobytes()  # modulo 5: 0 2 3 0 2
    assert poisson_rows(5, 2, lambda count: words[:count]).tolist() == [0, 3]


# --- Numbers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 52_586])
def test_noise_is_gaussian(chance: Chance, size: int) -> None:
    drawn = np.concatenate([chance.noise(size, 3.0).copy() for _ in range(-(-100_000 // size) if size > 2 else 2000)])
    low, high = scipy.stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], drawn.size)
    assert low <= np.sum(np.square(drawn / 3.0)) <= high
    assert scipy.stats.kstest(drawn / 3.0, "norm").pvalue > FALSE_ALARM
    assert len(np.unique(drawn)) == drawn.size


def test_the_key_stream_is_chacha20() -> None:
    """The example of RFC 8439, section 2.3.2; the first word of its nonce is the counter's upper half here."""
    state = np.frombuffer(b"expand 32-byte k" + bytes(range(32)) + bytes(16), dtype="<u4").astype(np.uint32)
    state[14] = 0x4A000000
    words = np.zeros(16, dtype=np.uint32)
    private_kernel.functions().chance.words(state, np.uint64(0x09000000_00000001), words)
    assert words.astype("<u4").tobytes().hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def test_a_stream_is_read_once_and_its_blocks_go_on() -> None:
    whole, parts = (ChaChaChance(bytes(range(32))) for _ in range(2))
    stream = whole.random_bytes(64 * 300)
    assert parts.random_bytes(64) == stream[:64]
    assert parts.random_bytes(10) == stream[64:74]
    noise = parts.noise(5, 1.0).copy()
    words = np.frombuffer(stream, dtype="<u4").reshape(-1, 16)[2 : 2 + compiled_chance.LANES].astype(np.float64)
    radius = np.sqrt(-2.0 * np.log(words[:5, 0] * 2.0**-32 + (words[:5, 1] + 0.5) * 2.0**-64))
    quarter, high = np.divmod(words[:5, 2], 2.0**30)
    angle = (high * 2.0**-30 + (words[:5, 3] + 0.5) * 2.0**-62 - 0.5) * np.pi / 2
    first = np.where(quarter % 2 == 1, np.sin(angle), np.cos(angle)) * np.where(quarter >= 2, -1.0, 1.0)
    assert noise == pytest.approx(radius * first, rel=1e-13)
    following = 2 + compiled_chance.LANES
    assert parts.random_bytes(64) == stream[64 * following : 64 * (following + 1)]


def test_compiled_code_in_the_cache_is_of_the_loops_it_was_made_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Numba looks at the time of one file alone, and these functions use loops of another."""

    def key() -> Any:
        function = compiled_private.dispatchers(cache=True).clipped_sum
        return function._cache._index_key(compiled_private.SIGNATURES[0], function.targetctx.codegen())

    before = key()
    assert before == key()
    changed = tmp_path / "compiled.py"
    changed.write_text(Path(compiled.__file__).read_text() + "# changed")
    monkeypatch.setattr(compiled, "__file__", str(changed))
    assert key() != before
