"""How rounds and local training run: the policy row, frozen for one run, with what the run sets for itself.

The installation has one default policy. An organisation's own policy may only restrict: leave its learners out of
rounds, and lower its caps of epsilon.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Any, Self

from django.db import models
from django.utils.translation import gettext as _

from aivo_core.engine.contract import LocalTrainingConfig
from aivo_site.errors import UsageError
from federation import strategies
from federation.models import (
    Adaptation,
    ContributionSource,
    Engine,
    FederationPolicy,
    PromotionMode,
    Sampling,
    ServerOptimiser,
    Strategy,
)
from federation.privacy_policy import privacy_refusal
from federation.strategies import StrategyError

DEFAULT_POLICY_NAME = "default"
RESTRICTIONS = ("participates", "epsilon_cap", "epsilon_cap_learner")
"""The fields of an organisation's policy that count."""

GUARDED = ("total", "content", "path", "score")

_CHOICES: Mapping[str, type[models.TextChoices]] = {
    "server_optimiser": ServerOptimiser,
    "contribution_source": ContributionSource,
    "engine": Engine,
    "adaptation": Adaptation,
    "promotion": PromotionMode,
    "sampling": Sampling,
}
_COUNTS = {
    "minimum_learners": 1, "max_stale_days": 1, "min_samples": 1, "max_samples": 1, "max_versions_behind": 0,
    "deadline_minutes": 1, "local_epochs": 1, "batch_size": 1, "bias_epochs": 1, "gate_minimum_learners": 2, "gate_draws": 200,
}  # fmt: skip
_MOST = 2**31 - 1
_POSITIVE = ("server_learning_rate", "learning_rate", "bias_learning_rate", "max_delta_norm")
_NOT_NEGATIVE = ("staleness_exponent", "proximal_mu", "personal_mu", "gate_minimum_gain")


class PolicyError(UsageError):
    """A policy that cannot be run; the message names the field and the allowed values.

    ``code``: ``bad_policy``, ``unknown_strategy``, ``unknown_parameter``, ``bad_parameter``, ``unknown_field``,
    ``strategy_not_private``, ``sessions_need_tail``, ``not_available``, ``only_restrictions``, those of
    ``privacy_refusal`` and of ``federation.rounds.private.privacy_of``.
    """

    default_code = "bad_policy"


@dataclass(frozen=True)
class RoundPolicy:
    """A policy as one run uses it; the fields are those of ``FederationPolicy``, their defaults too.

    A value built by hand is checked by ``validate``.
    """

    strategy: str = Strategy.FEDPROX.value
    strategy_parameters: Mapping[str, Any] = field(default_factory=dict)
    server_optimiser: str = ServerOptimiser.NONE.value
    server_learning_rate: float = 1.0
    contribution_source: str = ContributionSource.ROUND.value
    minimum_learners: int = 5
    max_stale_days: int = 7
    min_samples: int = 50
    max_samples: int = 2000
    staleness_exponent: float = 0.5
    max_versions_behind: int = 2
    max_delta_norm: float = 100.0
    norm_outlier_factor: float = 10.0
    deadline_minutes: int = 240
    engine: str = Engine.COHORT.value
    local_epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 1e-3
    proximal_mu: float = 1.0
    adaptation: str = Adaptation.TAIL_THEN_BIAS.value
    personal_mu: float = 10.0
    bias_epochs: int = 5
    bias_learning_rate: float = 5e-3
    promotion: str = PromotionMode.AUTOMATIC.value
    guarded_metrics: Mapping[str, float] = field(default_factory=dict)
    gate_minimum_learners: int = 10
    gate_minimum_gain: float = 0.0
    gate_draws: int = 2000
    canary_share: float = 0.0
    differential_privacy: bool = False
    target_epsilon: float | None = None
    clip_norm: float | None = None
    noise_multiplier: float | None = None
    sampling: str = Sampling.NONE.value
    adaptive_clipping: bool = False
    epsilon_cap: float | None = None
    epsilon_cap_learner: float | None = None
    epsilon_override_reason: str = ""
    sample_level_privacy: bool = False
    upload_privacy: bool = False

    @classmethod
    def from_row(cls, row: FederationPolicy, **overrides: Any) -> Self:
        """The row's policy, with some fields set for this run; not yet validated.

        Raises:
            PolicyError: ``unknown_field``: an override of no field.
        """
        values = {f.name: getattr(row, f.name) for f in fields(cls)}
        return cls(**_known(cls, {**values, **overrides}))

    def to_json(self) -> dict[str, Any]:
        """All fields, as a round keeps them."""
        return {
            **asdict(self),
            "strategy_parameters": dict(self.strategy_parameters),
            "guarded_metrics": dict(self.guarded_metrics),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``to_json``; a field that a policy did not have yet when it was kept takes its default.

        Raises:
            PolicyError: ``unknown_field``.
        """
        return cls(**_known(cls, data))

    @property
    def contribution_mu(self) -> float:
        """Proximal term of contributions: FedAvg as published trains without one."""
        return 0.0 if self.strategy == Strategy.FEDAVG else self.proximal_mu

    @property
    def personal_tail_mu(self) -> float:
        """Proximal term of personal training: that of contributions where the sessions themselves are contributed."""
        return self.contribution_mu if self.contribution_source == ContributionSource.SESSIONS else self.personal_mu

    def contribution_config(self) -> LocalTrainingConfig:
        """Training of a round's contributions: the whole tail, nothing but the tail."""
        return LocalTrainingConfig(
            epochs=self.local_epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            proximal_mu=self.contribution_mu,
            adaptation="tail",
        )

    def personal_config(self) -> LocalTrainingConfig:
        """Training of a learner's own copy."""
        return LocalTrainingConfig(
            epochs=self.local_epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            proximal_mu=self.personal_tail_mu,
            adaptation=str(self.adaptation),
            bias_epochs=self.bias_epochs,
            bias_learning_rate=self.bias_learning_rate,
        )

    def validate(self) -> None:
        """Check every field, and that the fields go together.

        Raises:
            PolicyError: naming the first field that is refused, and what is allowed.
        """
        self._check_strategy()
        self._check_choices()
        self._check_numbers()
        self._check_guarded_metrics()
        if self.contribution_source == ContributionSource.SESSIONS and self.adaptation == Adaptation.DIFFICULTY_BIAS:
            raise PolicyError(
                _(
                    "contribution_source sessions needs an adaptation that trains the tail (%(allowed)s), not %(given)s: "
                    "its sessions have no delta to contribute"
                )
                % {"allowed": f"{Adaptation.TAIL}, {Adaptation.TAIL_THEN_BIAS}", "given": self.adaptation},
                code="sessions_need_tail",
            )
        if self.max_samples < self.min_samples:
            raise PolicyError(
                _("max_samples must be at least min_samples (%(least)d), not %(given)d")
                % {"least": self.min_samples, "given": self.max_samples}
            )
        self._check_available()

    def _check_strategy(self) -> None:
        try:
            chosen = strategies.get(self.strategy)
            chosen.check_parameters(self.strategy_parameters)
        except StrategyError as error:
            raise PolicyError(str(error), code=error.code) from error
        if self.differential_privacy and not chosen.info.privacy_compatible:
            private = [name for name in strategies.names() if strategies.get(name).info.privacy_compatible]
            raise PolicyError(
                _(
                    "strategy must be one of %(allowed)s with differential_privacy, not %(given)s: "
                    "no learner's share of its result is bounded"
                )
                % {"allowed": ", ".join(private), "given": self.strategy},
                code="strategy_not_private",
            )

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices.values:
                raise PolicyError(
                    _("%(field)s must be one of %(allowed)s, not %(given)s")
                    % {"field": name, "allowed": ", ".join(choices.values), "given": ascii(getattr(self, name))[:80]}
                )

    def _check_numbers(self) -> None:
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
                raise PolicyError(
                    _("%(field)s must be a whole number of at least %(least)d, not %(given)s")
                    % {"field": name, "least": least, "given": ascii(value)[:80]}
                )
        for name in _POSITIVE:
            _check_range(name, getattr(self, name), 0.0, None, _("positive"))
        for name in _NOT_NEGATIVE:
            _check_range(name, getattr(self, name), None, None, _("0 or more"))
        _check_range("norm_outlier_factor", self.norm_outlier_factor, None, None, _("1 or more"), least=1.0)
        _check_range("canary_share", self.canary_share, None, 1.0, _("from 0 to 1"))

    def _check_guarded_metrics(self) -> None:
        if not isinstance(self.guarded_metrics, Mapping) or not set(self.guarded_metrics) <= set(GUARDED):
            raise PolicyError(
                _("guarded_metrics must be an object with keys of %(allowed)s, not %(given)s")
                % {"allowed": ", ".join(GUARDED), "given": ascii(self.guarded_metrics)[:80]}
            )
        for name, tolerance in self.guarded_metrics.items():
            _check_range(f"guarded_metrics.{name}", tolerance, None, None, _("0 or more"))

    def _check_available(self) -> None:
        """Refuse what a policy may say and this version cannot do, rather than ignore it."""
        refused = privacy_refusal(self)
        if refused is not None:
            raise PolicyError(refused[1], code=refused[0])
        if self.server_optimiser != ServerOptimiser.NONE:
            raise PolicyError(
                _("server_optimiser %(given)s is not available; allowed: none") % {"given": self.server_optimiser},
                code="not_available",
            )
        if self.canary_share:
            raise PolicyError(_("canary_share must be 0: canaries are not available"), code="not_available")


def default_policy() -> FederationPolicy:
    """The installation's policy, made with the product's defaults when there is none."""
    row, _created = FederationPolicy.objects.get_or_create(organisation=None, name=DEFAULT_POLICY_NAME)
    return row


def check_row(row: FederationPolicy) -> None:
    """What a form or an API checks before it saves a policy.

    Raises:
        PolicyError: the default policy cannot be run; an organisation's policy (``only_restrictions``) sets more than
            whether it takes part and lower caps.
    """
    if row.organisation_id is None:
        RoundPolicy.from_row(row).validate()
        return
    default = default_policy()
    more = [
        f.name for f in fields(RoundPolicy) if f.name not in RESTRICTIONS and getattr(row, f.name) != getattr(default, f.name)
    ]
    higher = [name for name in RESTRICTIONS[1:] if _is_higher(getattr(row, name), getattr(default, name))]
    if more or higher:
        raise PolicyError(
            _("An organisation's policy may only restrict: set %(allowed)s (caps only lower), not %(given)s.")
            % {"allowed": ", ".join(RESTRICTIONS), "given": ", ".join([*more, *higher])},
            code="only_restrictions",
        )


def _is_higher(own: float | None, installation: float | None) -> bool:
    return own is not None and installation is not None and own > installation


def _known(cls: type[RoundPolicy], values: Mapping[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise PolicyError(
            _("a policy may have the fields %(allowed)s, not %(given)s")
            % {"allowed": ", ".join(names), "given": ", ".join(unknown)},
            code="unknown_field",
        )
    return dict(_plain(values))


def _plain(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Enumeration members as their plain words."""
    for name, value in values.items():
        yield name, value.value if isinstance(value, models.TextChoices) else value


def _check_range(name: str, value: Any, above: float | None, most: float | None, allowed: str, *, least: float = 0.0) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    holds = is_number and value >= least and (above is None or value > above) and (most is None or value <= most)
    if not holds:
        raise PolicyError(
            _("%(field)s must be a number that is %(allowed)s, not %(given)s")
            % {"field": name, "allowed": allowed, "given": ascii(value)[:80]}
        )
