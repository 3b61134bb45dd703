"""Whether the ledger still says what was charged: every figure is computed again, every row compared with the audit log."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isclose
from typing import Any
from uuid import UUID

from django.utils.translation import gettext as _

from aivo_site.audit.models import AuditEvent
from federation import privacy_periods
from federation.ledger import ACTION, digest_of, release_of
from federation.models import PrivacyLedgerEntry, PrivacyPeriod
from federation.privacy.accountant import AccountantError
from federation.privacy.composition import compose
from federation.privacy.release import Release

Past = dict[tuple[UUID, str, str], dict[UUID | None, Counter[Release]]]
"""What was charged before a row: by period, unit and adjacency, then by subject key, each kind of release with its steps."""

SAME = 1e-9
"""Relative difference of an ε computed again that rounding explains."""

_SHOWN = 100


@dataclass(frozen=True)
class LedgerProblem:
    """One row that does not say what was charged.

    ``code``: ``missing``, ``altered`` (not what the audit log has the hash of), ``not_in_audit_log``, ``wrong_epsilon``,
    ``wrong_period`` (δ or rate are not the period's), ``altered_period`` (a period is not what the audit log says it declared;
    ``sequence`` is 0), ``unreadable``.
    """

    sequence: int
    code: str
    message: str


@dataclass(frozen=True)
class LedgerVerification:
    """What a check of the whole ledger found; ``problems`` holds the first hundred, ``problem_count`` counts all."""

    entries: int
    problem_count: int
    problems: list[LedgerProblem] = field(default_factory=list)

    @property
    def verified(self) -> bool:
        return self.problem_count == 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verified": self.verified}


def verify_ledger() -> LedgerVerification:
    """Recompute every row's ε, alone and composed with the rows before it, and compare it with the audit log.

    The audit log's own chain is checked by ``aivo_site.audit.services.verify``.
    """
    digests = _audited()
    periods = {period.pk: period for period in PrivacyPeriod.objects.all()}
    past: Past = {}
    problems = list(_altered_periods(periods.values()))
    count, entries, sequence = len(problems), 0, 0
    for entry in PrivacyLedgerEntry.objects.order_by("sequence").iterator(chunk_size=2000):
        found = [*_missing(sequence, entry.sequence), *_problems(entry, periods[entry.period_id], digests, past)]
        count += len(found)
        problems += found[: max(0, _SHOWN - len(problems))]
        entries += 1
        sequence = entry.sequence
    rest = list(_missing(sequence, max([sequence, *digests]) + 1))
    return LedgerVerification(entries, count + len(rest), [*problems, *rest][:_SHOWN])


def _charged(past: Past, entry: PrivacyLedgerEntry) -> dict[UUID | None, Counter[Release]]:
    return past.setdefault((entry.period_id, str(entry.unit), str(entry.adjacency)), defaultdict(Counter))


def _altered_periods(periods: Iterable[PrivacyPeriod]) -> Iterator[LedgerProblem]:
    declared = {
        str(event.object_id): event.data for event in AuditEvent.objects.filter(action=privacy_periods.BEGUN).order_by("sequence")
    }
    for period in periods:
        data = declared.get(str(period.pk))
        names = [name for name in privacy_periods.DECLARED if data is None or data.get(name) != getattr(period, name)]
        if names:
            text = _("period %(n)d: the audit log says otherwise of %(names)s") % {"n": period.number, "names": ", ".join(names)}
            yield LedgerProblem(0, "altered_period", text)


def _audited() -> dict[int, str]:
    events = AuditEvent.objects.filter(action=ACTION).order_by("sequence").values_list("data", flat=True)
    return {int(data["sequence"]): str(data["sha256"]) for data in events.iterator(chunk_size=2000)}


def _missing(before: int, sequence: int) -> Iterator[LedgerProblem]:
    for number in range(before + 1, sequence):
        yield LedgerProblem(number, "missing", _("entry %d is missing") % number)


def _problems(
    entry: PrivacyLedgerEntry,
    period: PrivacyPeriod,
    digests: Mapping[int, str],
    past: Past,
) -> Iterator[LedgerProblem]:
    def problem(code: str, message: str) -> LedgerProblem:
        return LedgerProblem(entry.sequence, code, _("entry %(n)d: %(what)s") % {"n": entry.sequence, "what": message})

    known = digests.get(entry.sequence)
    if known is None:
        yield problem("not_in_audit_log", _("the audit log has no such charge"))
    elif known != digest_of(entry):
        yield problem("altered", _("its content is not what the audit log has the hash of"))
    if entry.delta != period.delta:
        yield problem(
            "wrong_period", _("δ is %(own)g, the period's is %(period)g") % {"own": entry.delta, "period": period.delta}
        )
    if entry.subject_key is None and entry.q_num * period.q_den != period.q_num * entry.q_den:
        rates = {"own": f"{entry.q_num}/{entry.q_den}", "period": f"{period.q_num}/{period.q_den}"}
        yield problem("wrong_period", _("the rate is %(own)s, the period's is %(period)s") % rates)
    try:
        release = release_of(entry)
        charged = _charged(past, entry)
        charged[entry.subject_key][replace(release, steps=1)] += release.steps
        mine = charged[None] if entry.subject_key is None else charged[None] + charged[entry.subject_key]
        alone = compose([release], entry.delta)
        total = compose([replace(kind, steps=steps) for kind, steps in mine.items()], entry.delta)
    except AccountantError as error:
        yield problem("unreadable", str(error))
        return
    for name, stored, computed in (
        ("epsilon", entry.epsilon, alone.epsilon),
        ("epsilon_total", entry.epsilon_total, total.epsilon),
    ):
        if not isclose(stored, computed, rel_tol=SAME, abs_tol=1e-12):
            text = _("%(name)s is %(stored).10g, computed again %(computed).10g by %(library)s (charged by %(then)s)")
            yield problem(
                "wrong_epsilon",
                text
                % {
                    "name": name,
                    "stored": stored,
                    "computed": computed,
                    "library": alone.accountant_version,
                    "then": entry.accountant_version,
                },
            )
