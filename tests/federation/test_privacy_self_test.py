"""The self-test passes on this installation and sees every mechanism that is broken on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from aivo_core.privacy import clip, gaussian
from aivo_core.privacy_mechanisms import GaussianSumMechanism, privatise_upload
from federation.privacy import self_test as module
from federation.privacy.references import REFERENCES
from federation.privacy.self_test import Check, self_test

Array = np.ndarray[Any, Any]


class Broken(GaussianSumMechanism):
    """A base for mechanisms with one fault each; protects nobody."""


class HalvedNoise(Broken):
    @property
    def noise_std(self) -> float:
        return super().noise_std / 2.0


class NoiseOfTheMean(Broken):
    """Noise scaled for a mean of twenty, added to the sum."""

    @property
    def noise_std(self) -> float:
        return super().noise_std / self.denominator


class NoiseWithoutC(Broken):
    @property
    def noise_std(self) -> float:
        return self.noise_multiplier * 0.5


class ClipPerTensor(Broken):
    def clip(self, delta: Any) -> Any:
        half = delta.shape[0] // 2
        return np.concatenate([clip(delta[:half], self.clip_norm), clip(delta[half:], self.clip_norm)])


class ClipPerCoordinate(Broken):
    def clip(self, delta: Any) -> Any:
        return np.clip(delta, -self.clip_norm, self.clip_norm)


class NoClip(Broken):
    def clip(self, delta: Any) -> Any:
        return delta


class AlwaysRescales(Broken):
    def clip(self, delta: Any) -> Any:
        return clip((delta.astype(np.float64) * 1e12).astype(np.float32) if np.abs(delta).max() < 1e3 else delta, self.clip_norm)


class OneDrawForAll(Broken):
    def add_noise(self, total: Any) -> Any:
        return total + gaussian(1, self.noise_std)


class CutOffNoise(Broken):
    def add_noise(self, total: Any) -> Any:
        return total + np.clip(gaussian(total.shape[0], self.noise_std), -3.0 * self.noise_std, 3.0 * self.noise_std)


class ShiftedNoise(Broken):
    def add_noise(self, total: Any) -> Any:
        return super().add_noise(total) + 0.02 * self.noise_std


class SeededInTheMechanism(Broken):
    def __init__(self, **settings: float) -> None:
        super().__init__(**settings, rng=np.random.default_rng(0))


class SeededByTheProgram(Broken):
    def add_noise(self, total: Any) -> Any:
        return total + np.random.normal(scale=self.noise_std, size=total.shape)


class CopyableState(Broken):
    def __init__(self, **settings: float) -> None:
        super().__init__(**settings, rng=np.random.default_rng())


FAULTS = [
    (HalvedNoise, "noise_spread"),
    (NoiseOfTheMean, "noise_spread"),
    (NoiseWithoutC, "noise_doubles_with_c"),
    (ClipPerTensor, "clipping_bound"),
    (ClipPerTensor, "outlier_bound"),
    (ClipPerCoordinate, "clipping_bound"),
    (NoClip, "outlier_bound"),
    (AlwaysRescales, "clipping_leaves_small_deltas"),
    (OneDrawForAll, "noise_spread"),
    (CutOffNoise, "noise_largest"),
    (ShiftedNoise, "noise_mean"),
    (SeededInTheMechanism, "noise_not_seeded"),
    (SeededByTheProgram, "noise_not_seeded"),
    (CopyableState, "noise_not_seeded"),
]


@pytest.fixture(scope="module", autouse=True)
def references_computed_once() -> Iterator[None]:
    """The accountant's checks do not depend on the mechanism: their figures are computed once."""
    figures = {reference.name: reference.computed() for reference in REFERENCES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("federation.privacy.references.Reference.computed", lambda reference: figures[reference.name])
        yield


def test_this_installation_passes() -> None:
    result = self_test()
    assert result.passed, [check.to_json() for check in result.failed]
    names = [check.name for check in result.checks]
    assert len(names) == len(set(names))
    assert sum(name.startswith("accountant:") for name in names) == len(REFERENCES)
    report = json.loads(json.dumps(result.to_json()))
    assert report["failed"] == 0
    assert {"name", "meaning", "measured", "low", "high", "passed"} == set(report["checks"][0])


@pytest.mark.parametrize(("broken", "check"), FAULTS)
def test_a_broken_mechanism_is_seen(broken: Any, check: str) -> None:
    result = self_test(make_mechanism=broken)
    assert check in {failed.name for failed in result.failed}
    assert not result.passed
    assert result.to_json()["failed"] == len(result.failed)


def half_the_noise(delta: Array, /, *, clip_norm: float, noise_multiplier: float) -> Array:
    return privatise_upload(delta, clip_norm=clip_norm, noise_multiplier=noise_multiplier / 2.0)


def clipped_to_twice(delta: Array, /, *, clip_norm: float, noise_multiplier: float) -> Array:
    return privatise_upload(delta, clip_norm=2.0 * clip_norm, noise_multiplier=noise_multiplier / 2.0)


@pytest.mark.parametrize(
    ("broken", "check"), [(half_the_noise, "upload_noise_spread"), (clipped_to_twice, "upload_clipping_bound")]
)
def test_a_broken_upload_is_seen(broken: Any, check: str) -> None:
    assert [failed.name for failed in self_test(upload=broken).failed] == [check]


def test_an_accountant_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("federation.privacy.references.Reference.computed", lambda reference: reference.exact * 0.99)
    failed = {check.name for check in self_test().failed}
    assert failed == {f"accountant:{reference.name}" for reference in REFERENCES}


def test_a_choice_of_cohorts_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "poisson_cohort", lambda members, q_num, q_den: list(members)[::9])
    assert [check.name for check in self_test().failed] == ["poisson_rate"]


@pytest.mark.parametrize(("measured", "passed"), [(0.0, True), (1.0, True), (1.1, False), (float("nan"), False)])
def test_a_check_passes_within_its_bounds_and_a_number_that_is_none_fails(measured: float, passed: bool) -> None:
    assert Check("c", "", measured, 0.0, 1.0).passed is passed


def test_fresh_processes_draw_different_noise_and_cohorts() -> None:
    code = (
        "from aivo_core.privacy import gaussian; from aivo_core.privacy_sampling import poisson_cohort;"
        "print(gaussian(4, 1.0).tobytes().hex(), poisson_cohort(range(200), 1, 2))"
    )
    answers = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout for _ in range(2)}
    assert len(answers) == 2
