"""What every local training engine takes and gives back: the seam between a round and the arithmetic.

The local objective of a learner, over batches of ``batch_size`` samples (each with its first- and second-pass row):

    content cross entropy + path cross entropy + 1/2 ordinal loss (first pass) + 1/2 ordinal loss (second pass)
        + mu/2 * ||w - w_anchor||^2

(FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", equation 2.) The trunk runs in inference
mode, dropout included; batch normalisation runs in inference mode everywhere; dropout of the tail runs in training mode.

Private training (``sample_clip_norm`` and ``sample_noise_multiplier``) takes other steps on the same objective:
``aivo_core.engine.private``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from aivo_core.network import FloatArray, NetworkSpec, Weights
from aivo_core.samples import Samples

ADAPTATIONS = ("tail", "difficulty_bias", "tail_then_bias")
OPTIMISERS = ("adam", "sgd")

CLIP_NORMS = (1e-12, 1e12)
NOISE_MULTIPLIERS = (1e-6, 1e6)
"""Allowed values in private training: single precision holds clipped gradients in this range, the accountant this noise."""


class EngineError(ValueError):
    """A training configuration or task that is refused; ``code`` is stable, the message names the field."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class LocalTrainingConfig:
    """How one learner's tail is trained.

    Attributes:
        epochs, batch_size, learning_rate, proximal_mu: of the tail pass.
        adaptation: ``tail`` trains the whole tail; ``difficulty_bias`` only the ten biases of the difficulty head, on
            the second-pass ordinal loss; ``tail_then_bias`` one after the other.
        bias_epochs, bias_learning_rate: of the bias pass.
        optimiser: ``adam`` (as Keras defines it, state zero at the start) or ``sgd`` with ``momentum``.
        dropout: whether the tail's dropout runs (parity tests switch it off).
        sample_clip_norm, sample_noise_multiplier: C and z of private training (``aivo_core.engine.private``), both or
            neither, with ``adaptation`` ``tail``; ``batch_size`` is then the expected size of a batch.

    Raises:
        EngineError: a value outside its range.
    """

    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 1e-3
    proximal_mu: float = 1.0
    adaptation: str = "tail"
    bias_epochs: int = 5
    bias_learning_rate: float = 5e-3
    optimiser: str = "adam"
    momentum: float = 0.0
    dropout: bool = True
    sample_clip_norm: float | None = None
    sample_noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        _check(self.epochs >= 1, f"epochs must be at least 1, not {self.epochs}")
        _check(self.bias_epochs >= 1, f"bias_epochs must be at least 1, not {self.bias_epochs}")
        _check(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        _check(0.0 < self.learning_rate < 1e3, f"learning_rate must be positive, not {self.learning_rate}")
        _check(0.0 < self.bias_learning_rate < 1e3, f"bias_learning_rate must be positive, not {self.bias_learning_rate}")
        _check(0.0 <= self.proximal_mu < 1e9, f"proximal_mu must be 0 or more, not {self.proximal_mu}")
        _check(0.0 <= self.momentum < 1.0, f"momentum must lie in [0, 1), not {self.momentum}")
        _check(self.adaptation in ADAPTATIONS, f"adaptation must be one of {', '.join(ADAPTATIONS)}, not {self.adaptation}")
        _check(self.optimiser in OPTIMISERS, f"optimiser must be one of {', '.join(OPTIMISERS)}, not {self.optimiser}")
        self._check_privacy()

    def _check_privacy(self) -> None:
        both = {"sample_clip_norm": self.sample_clip_norm, "sample_noise_multiplier": self.sample_noise_multiplier}
        if set(both.values()) == {None}:
            return
        for (name, value), (low, high) in zip(both.items(), (CLIP_NORMS, NOISE_MULTIPLIERS), strict=True):
            _check(value is not None, f"{name} must be given, as {' and '.join(both)} go together")
            _check(value is not None and low <= value <= high, f"{name} must lie in [{low:g}, {high:g}], not {value}")
        _check(
            self.adaptation == "tail",
            f"adaptation must be tail with sample_noise_multiplier, not {self.adaptation}: its pass over the biases has no noise",
        )

    @property
    def is_private(self) -> bool:
        """Whether training is by clipped and noised steps."""
        return self.sample_noise_multiplier is not None

    @property
    def trains_tail(self) -> bool:
        return self.adaptation != "difficulty_bias"

    @property
    def trains_bias(self) -> bool:
        return self.adaptation != "tail"


@dataclass(frozen=True)
class SamplePrivacy:
    """What a private training has released, for the accountant: ``steps`` Gaussian mechanisms on Poisson batches.

    Attributes:
        steps: noised steps, those with an empty batch included.
        q_num, q_den: each step takes each training sample independently with this chance.
        noise_multiplier: z; the noise on a batch's sum has standard deviation z C in each coordinate.
        clip_norm: C, the most that one training sample moves the sum, in L2 norm.
    """

    steps: int
    q_num: int
    q_den: int
    noise_multiplier: float
    clip_norm: float


@dataclass(frozen=True)
class LearnerTask:
    """One learner's local training.

    Attributes:
        key: names the learner in the result; never influences it.
        samples: the learner's training samples.
        start_tail: (tail_size,) float32, where training starts.
        anchor_tail: (tail_size,) float32, w_anchor of the proximal term: the base version's tail.
        seed: with the data, all that the result depends on; private training does not read it.
    """

    key: str
    samples: Samples
    start_tail: FloatArray
    anchor_tail: FloatArray
    seed: int


@dataclass(frozen=True)
class LearnerResult:
    """What came of one task; ``error_code`` is empty when it succeeded, and only then are the arrays there.

    Attributes:
        tail: (tail_size,) float32 after all passes.
        tail_pass_delta: (tail_size,) float32, tail after the tail pass minus ``start_tail`` (zero without a tail pass).
        losses: mean objective per epoch of the passes, in order; none of private training, which would tell them without
            noise.
        samples, steps: trained on, taken.
        backend: what computed it, with its version ("numba 0.68.1").
        privacy: what was released, of private training; else None.
    """

    key: str
    tail: FloatArray | None = None
    tail_pass_delta: FloatArray | None = None
    losses: tuple[float, ...] = field(default=())
    samples: int = 0
    steps: int = 0
    seconds: float = 0.0
    error_code: str = ""
    error_message: str = ""
    backend: str = ""
    privacy: SamplePrivacy | None = None


class LocalTrainingEngine(Protocol):
    """Trains learners one after the other or many at once; results come in the order of the tasks.

    A learner's result depends on its seed and its data only, never on its neighbours (of private training: on its data and
    on chance). A task that cannot be trained
    gives a result with ``error_code``; it never disturbs the others.
    """

    name: str

    @property
    def backend(self) -> str:
        """What computes, with its version; a result's own ``backend`` says what computed that one."""
        ...

    def train(
        self, *, spec: NetworkSpec, weights: Weights, config: LocalTrainingConfig, tasks: Iterable[LearnerTask]
    ) -> Iterator[LearnerResult]:
        """Train each task; ``weights`` are the base main version's, of which only trunk and statistics are read."""
        ...


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise EngineError(message, code="bad_config")
