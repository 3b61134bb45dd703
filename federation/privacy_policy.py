"""Which settings of a policy go together with differential privacy, as far as the policy alone can say."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from django.utils.translation import gettext as _

from federation.models import ContributionSource, Sampling
from federation.privacy.accountant import AccountantError, epsilon

if TYPE_CHECKING:
    from federation.policies import RoundPolicy

EPSILON_LIMIT = 50.0
"""Above, a policy needs a written reason: nobody is protected in any sense that could be explained."""

LARGEST_DELTA = 1e-5
"""The δ of every population of up to 35,000 learners, unless another is declared."""

NOT_AVAILABLE = ("adaptive_clipping", "sample_level_privacy", "upload_privacy")
_ONLY_PRIVATE = ("target_epsilon", "clip_norm", "noise_multiplier", "epsilon_override_reason")

Refusal = tuple[str, str]
"""Code and message."""


def privacy_refusal(policy: RoundPolicy) -> Refusal | None:
    """Why the policy's settings of privacy cannot be; None where they can.

    ``code``: ``privacy_not_available``, ``needs_privacy``: a setting without effect, ``privacy_incomplete``: C, z or ε is
    missing or out of range, ``not_private``: a combination that bounds nothing, ``epsilon_too_large``.
    """
    missing = [name for name in NOT_AVAILABLE if getattr(policy, name)]
    if missing:
        text = _("These parts of privacy are not available yet: leave %(fields)s unset.")
        return "privacy_not_available", text % {"fields": ", ".join(missing)}
    if policy.sampling == Sampling.FIXED_SIZE:
        text = _("sampling must be one of none, poisson, not fixed_size: cohorts of a fixed size are not available yet.")
        return "privacy_not_available", text
    caps = [
        name for name in ("epsilon_cap", "epsilon_cap_learner", "target_epsilon") if not _none_or_positive(getattr(policy, name))
    ]
    if caps:
        return "privacy_incomplete", _("%s must be a positive number") % ", ".join(caps)
    return _refusal_of_private(policy) if policy.differential_privacy else _refusal_of_plain(policy)


def single_round_epsilon(noise_multiplier: float) -> float:
    """ε of one round against those who see who took part, at δ = 1e-5: no rate of sampling makes that figure smaller.

    Raises:
        AccountantError: no noise, or a value out of range.
    """
    return epsilon(z=noise_multiplier, q_num=1, q_den=1, steps=1, delta=LARGEST_DELTA).epsilon


def _refusal_of_plain(policy: RoundPolicy) -> Refusal | None:
    idle = [name for name in _ONLY_PRIVATE if getattr(policy, name) not in (None, "")]
    if policy.sampling != Sampling.NONE:
        idle.append("sampling")
    if not idle:
        return None
    text = _("%(fields)s would have no effect: set differential_privacy, or leave them unset.")
    return "needs_privacy", text % {"fields": ", ".join(idle)}


def _refusal_of_private(policy: RoundPolicy) -> Refusal | None:
    if policy.clip_norm is None or not _none_or_positive(policy.clip_norm):
        return "privacy_incomplete", _("clip_norm must be a positive number with differential_privacy, not %s") % policy.clip_norm
    if (policy.noise_multiplier is None) == (policy.target_epsilon is None):
        return "privacy_incomplete", _("differential_privacy needs either target_epsilon or noise_multiplier, and not both")
    if policy.sampling == Sampling.POISSON and policy.contribution_source != ContributionSource.ROUND:
        text = _(
            "contribution_source must be round with sampling poisson, not %s: what a learner still has to contribute would "
            "depend on having been drawn before, and the smaller ε would not hold"
        )
        return "not_private", text % policy.contribution_source
    return _refusal_of_noise(policy)


def _refusal_of_noise(policy: RoundPolicy) -> Refusal | None:
    reasoned = bool(policy.epsilon_override_reason.strip())
    if policy.target_epsilon is not None:
        return None if reasoned or policy.target_epsilon <= EPSILON_LIMIT else too_large(policy.target_epsilon, "target_epsilon")
    try:
        spent = single_round_epsilon(policy.noise_multiplier or 0.0)
    except AccountantError as error:
        return "privacy_incomplete", _("noise_multiplier: %s") % error
    if spent <= EPSILON_LIMIT or reasoned:
        return None
    return too_large(spent, _("noise_multiplier %g, in a single round at δ = 1e-5") % (policy.noise_multiplier or 0.0))


def too_large(spent: float, what: str) -> Refusal:
    """The refusal of an ε above the limit."""
    text = _("%(what)s: ε = %(epsilon).4g, which protects nobody; above %(limit)g epsilon_override_reason must say why.")
    return "epsilon_too_large", text % {"what": what, "epsilon": spent, "limit": EPSILON_LIMIT}


def _none_or_positive(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value > 0.0)
