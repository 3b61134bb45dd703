"""How copies learn and how what they learnt comes home."""

from __future__ import annotations

from django.conf import settings
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Case, F, Q, Value, When
from django.utils.translation import gettext_lazy as _

from aivo_site.database import AppendOnlyRow, Row
from aivo_site.jobs.models import Job
from learners.models import Organisation
from models_store.models import MainModelVersion, PersonalizedModel


class Strategy(models.TextChoices):
    FEDAVG = "fedavg", _("FedAvg: mean weighted by samples")
    FEDPROX = "fedprox", _("FedProx: FedAvg with a proximal term in training")
    WEIGHTED = "weighted", _("Weighted: samples times measured quality, capped")
    MEDIAN = "median", _("coordinate-wise median")
    TRIMMED_MEAN = "trimmed_mean", _("trimmed mean")
    KRUM = "krum", _("Krum")
    MULTI_KRUM = "multi_krum", _("multi-Krum")
    BULYAN = "bulyan", _("Bulyan")
    GEOMETRIC_MEDIAN = "geometric_median", _("geometric median")
    NORM_BOUNDED_MEAN = "norm_bounded_mean", _("norm-bounded mean")


class ServerOptimiser(models.TextChoices):
    NONE = "none", _("none")
    AVGM = "avgm", _("server momentum")
    ADAGRAD = "adagrad", _("Adagrad")
    ADAM = "adam", _("Adam")
    YOGI = "yogi", _("Yogi")


class ContributionSource(models.TextChoices):
    ROUND = "round", _("round: a fresh delta from the current main model")
    SESSIONS = "sessions", _("sessions: what the learner's own training changed since the last contribution")


class Adaptation(models.TextChoices):
    TAIL = "tail", _("the whole tail")
    DIFFICULTY_BIAS = "difficulty_bias", _("ten numbers: the bias of the difficulty head")
    TAIL_THEN_BIAS = "tail_then_bias", _("the whole tail, then the bias of the difficulty head")


class PromotionMode(models.TextChoices):
    AUTOMATIC = "automatic", _("automatic: a candidate that passes the gate becomes active")
    MANUAL = "manual", _("manual: an operator decides")


class Engine(models.TextChoices):
    COHORT = "cohort", _("cohort: the fast engine")
    KERAS = "keras", _("Keras: the reference, some ten times slower")


class Sampling(models.TextChoices):
    NONE = "none", _("everyone takes part")
    POISSON = "poisson", _("Poisson: each member is drawn independently")
    FIXED_SIZE = "fixed_size", _("a fixed number is drawn")


class Adjacency(models.TextChoices):
    ADD_OR_REMOVE_ONE = "add_or_remove_one", _("add or remove one")
    REPLACE_ONE = "replace_one", _("replace one")


class PrivacyUnit(models.TextChoices):
    LEARNER = "learner", _("learner")
    SAMPLE = "sample", _("training sample")


class SessionPurpose(models.TextChoices):
    PERSONAL = "PERSONAL", _("personal: the learner's own copy")
    CONTRIBUTION = "CONTRIBUTION", _("contribution: for a round")


class RoundState(models.TextChoices):
    SELECTING = "SELECTING", _("selecting learners")
    TRAINING = "TRAINING", _("training contributions")
    INTAKE = "INTAKE", _("checking contributions")
    AGGREGATING = "AGGREGATING", _("aggregating")
    EVALUATING = "EVALUATING", _("evaluating the candidate")
    AWAITING_DECISION = "AWAITING_DECISION", _("waiting for a decision")
    CANARY = "CANARY", _("on trial with some learners")
    PROMOTED = "PROMOTED", _("promoted")
    REJECTED = "REJECTED", _("rejected by the gate")
    SKIPPED = "SKIPPED", _("skipped")
    FAILED = "FAILED", _("failed")
    CANCELLED = "CANCELLED", _("cancelled")


TERMINAL_ROUND_STATES = (RoundState.PROMOTED, RoundState.REJECTED, RoundState.SKIPPED, RoundState.FAILED, RoundState.CANCELLED)
OPEN_ROUND_STATES = tuple(state for state in RoundState if state not in TERMINAL_ROUND_STATES)


class Verdict(models.TextChoices):
    PENDING = "PENDING", _("not yet checked")
    ACCEPTED = "ACCEPTED", _("accepted")
    REJECTED = "REJECTED", _("rejected")
    QUARANTINED = "QUARANTINED", _("in quarantine")


class FederationPolicy(Row):
    """How rounds run. One default for the installation; an organisation's own policy may only restrict."""

    organisation = models.OneToOneField(
        Organisation,
        verbose_name=_("organisation"),
        null=True,
        blank=True,
        on_delete=models.CASCADE,
        related_name="federation_policy",
    )
    name = models.CharField(_("name"), max_length=100, default="default")
    participates = models.BooleanField(
        _("takes part in rounds"), default=True, help_text=_("An organisation may leave its learners out.")
    )

    strategy = models.CharField(_("strategy"), max_length=24, choices=Strategy.choices, default=Strategy.FEDPROX)
    strategy_parameters = models.JSONField(_("strategy parameters"), default=dict, blank=True)
    server_optimiser = models.CharField(
        _("server optimiser"), max_length=16, choices=ServerOptimiser.choices, default=ServerOptimiser.NONE
    )
    server_learning_rate = models.FloatField(_("server learning rate"), default=1.0, validators=[MinValueValidator(1e-6)])
    contribution_source = models.CharField(
        _("contribution source"), max_length=16, choices=ContributionSource.choices, default=ContributionSource.ROUND
    )
    minimum_learners = models.PositiveIntegerField(_("minimum learners"), default=5, validators=[MinValueValidator(1)])
    max_stale_days = models.PositiveIntegerField(
        _("maximum stale days"),
        default=7,
        validators=[MinValueValidator(1)],
        help_text=_("A learner's last local training may be this old."),
    )
    min_samples = models.PositiveIntegerField(_("minimum samples"), default=50, validators=[MinValueValidator(1)])
    max_samples = models.PositiveIntegerField(
        _("maximum samples"),
        default=2000,
        validators=[MinValueValidator(1)],
        help_text=_("A learner's latest samples that one contribution trains on."),
    )
    staleness_exponent = models.FloatField(_("staleness exponent"), default=0.5, validators=[MinValueValidator(0.0)])
    max_versions_behind = models.PositiveIntegerField(_("maximum versions behind"), default=2)
    max_delta_norm = models.FloatField(_("maximum delta norm"), default=100.0, validators=[MinValueValidator(1e-9)])
    norm_outlier_factor = models.FloatField(
        _("norm outlier factor"),
        default=10.0,
        validators=[MinValueValidator(1.0)],
        help_text=_("Times the cohort's median norm; more is quarantined."),
    )
    deadline_minutes = models.PositiveIntegerField(_("deadline in minutes"), default=240, validators=[MinValueValidator(1)])

    engine = models.CharField(_("engine"), max_length=16, choices=Engine.choices, default=Engine.COHORT)
    local_epochs = models.PositiveIntegerField(_("local epochs"), default=5, validators=[MinValueValidator(1)])
    batch_size = models.PositiveIntegerField(_("batch size"), default=32, validators=[MinValueValidator(1)])
    learning_rate = models.FloatField(_("learning rate"), default=1e-3, validators=[MinValueValidator(1e-9)])
    proximal_mu = models.FloatField(_("proximal term μ"), default=1.0, validators=[MinValueValidator(0.0)])
    adaptation = models.CharField(_("adaptation"), max_length=24, choices=Adaptation.choices, default=Adaptation.TAIL_THEN_BIAS)
    personal_mu = models.FloatField(_("personal proximal term μ"), default=10.0, validators=[MinValueValidator(0.0)])
    bias_epochs = models.PositiveIntegerField(_("bias epochs"), default=5, validators=[MinValueValidator(1)])
    bias_learning_rate = models.FloatField(_("bias learning rate"), default=5e-3, validators=[MinValueValidator(1e-9)])

    promotion = models.CharField(_("promotion"), max_length=16, choices=PromotionMode.choices, default=PromotionMode.AUTOMATIC)
    guarded_metrics = models.JSONField(
        _("guarded metrics"),
        default=dict,
        blank=True,
        help_text=_("{total|content|path|score: tolerance}; empty: the product's own tolerances."),
    )
    gate_minimum_learners = models.PositiveIntegerField(
        _("gate: minimum learners"), default=10, validators=[MinValueValidator(2)]
    )
    gate_minimum_gain = models.FloatField(_("gate: minimum gain"), default=0.0, validators=[MinValueValidator(0.0)])
    gate_draws = models.PositiveIntegerField(_("gate: bootstrap draws"), default=2000, validators=[MinValueValidator(200)])
    canary_share = models.FloatField(
        _("canary share"),
        default=0.0,
        validators=[MinValueValidator(0.0), MaxValueValidator(1.0)],
        help_text=_("Share of learners that try a candidate first; 0 is none."),
    )

    differential_privacy = models.BooleanField(_("differential privacy"), default=False)
    target_epsilon = models.FloatField(_("target ε"), null=True, blank=True, validators=[MinValueValidator(1e-6)])
    clip_norm = models.FloatField(_("clipping norm C"), null=True, blank=True, validators=[MinValueValidator(1e-9)])
    noise_multiplier = models.FloatField(_("noise multiplier z"), null=True, blank=True, validators=[MinValueValidator(0.0)])
    sampling = models.CharField(_("sampling"), max_length=16, choices=Sampling.choices, default=Sampling.NONE)
    adaptive_clipping = models.BooleanField(_("adaptive clipping"), default=False)
    epsilon_cap = models.FloatField(
        _("cap of ε for the federation"), null=True, blank=True, help_text=_("An organisation's own cap can only be lower.")
    )
    epsilon_cap_learner = models.FloatField(_("cap of ε for a learner"), null=True, blank=True)
    epsilon_override_reason = models.TextField(_("reason for ε above 50"), blank=True)
    sample_level_privacy = models.BooleanField(_("sample-level privacy in local training"), default=False)
    upload_privacy = models.BooleanField(_("local privacy for uploads"), default=False)

    class Meta:
        verbose_name = _("federation policy")
        verbose_name_plural = _("federation policies")
        constraints = (
            models.UniqueConstraint(fields=["name"], condition=Q(organisation__isnull=True), name="policy_name_once"),
            models.CheckConstraint(condition=Q(organisation__isnull=False) | Q(name="default"), name="policy_one_default"),
            models.CheckConstraint(condition=Q(strategy__in=Strategy.values), name="policy_strategy_known"),
            models.CheckConstraint(condition=Q(server_learning_rate__gt=0.0), name="policy_server_rate_positive"),
            models.CheckConstraint(condition=Q(learning_rate__gt=0.0, bias_learning_rate__gt=0.0), name="policy_rates_positive"),
            models.CheckConstraint(condition=Q(proximal_mu__gte=0.0, personal_mu__gte=0.0), name="policy_mu_not_negative"),
            models.CheckConstraint(
                condition=Q(minimum_learners__gte=1, local_epochs__gte=1, batch_size__gte=1), name="policy_counts_positive"
            ),
            models.CheckConstraint(
                condition=~Q(contribution_source=ContributionSource.SESSIONS) | ~Q(adaptation=Adaptation.DIFFICULTY_BIAS),
                name="policy_sessions_need_tail",
            ),
        )

    def __str__(self) -> str:
        return self.name


class PrivacyPeriod(Row):
    """A stretch of time over which releases compose: its population, δ, sampling and caps are constants."""

    number = models.PositiveIntegerField(_("number"), unique=True)
    population = models.PositiveIntegerField(_("population N₀"), validators=[MinValueValidator(2)])
    delta = models.FloatField(_("δ"))
    epsilon_cap = models.FloatField(_("cap of ε for the federation"), null=True, blank=True)
    epsilon_cap_learner = models.FloatField(_("cap of ε for a learner"), null=True, blank=True)
    q_num = models.PositiveBigIntegerField(_("sampling rate, numerator"), default=1)
    q_den = models.PositiveBigIntegerField(_("sampling rate, denominator"), default=1)
    expected_cohort = models.FloatField(
        _("expected cohort"), null=True, blank=True, help_text=_("What sums are divided by; empty: q times N₀.")
    )
    planned_rounds = models.PositiveIntegerField(
        _("planned rounds"),
        default=52,
        validators=[MinValueValidator(1)],
        help_text=_("Noise that follows from a target ε is enough for this many."),
    )
    started_at = models.DateTimeField(_("started at"))
    ended_at = models.DateTimeField(_("ended at"), null=True, blank=True)
    meaning = models.TextField(_("meaning"), help_text=_("Why a new period began, in words."))

    class Meta:
        verbose_name = _("privacy period")
        verbose_name_plural = _("privacy periods")
        ordering = ("-number",)
        constraints = (
            models.UniqueConstraint(Case(When(ended_at__isnull=True, then=Value(1))), name="period_one_open"),
            models.CheckConstraint(condition=Q(delta__gt=0.0, delta__lt=1.0), name="period_delta_bounds"),
            models.CheckConstraint(condition=Q(population__gte=2), name="period_population_bounds"),
            models.CheckConstraint(condition=Q(q_den__gte=1, q_num__lte=F("q_den")), name="period_q_bounds"),
        )

    def __str__(self) -> str:
        return str(self.number)


class AggregationRound(Row):
    """One attempt to aggregate."""

    sequence = models.PositiveIntegerField(_("sequence"), unique=True)
    state = models.CharField(_("state"), max_length=20, choices=RoundState.choices, default=RoundState.SELECTING)
    open_slot = models.PositiveSmallIntegerField(
        _("open slot"),
        null=True,
        blank=True,
        unique=True,
        default=1,
        editable=False,
        help_text=_("1 while the round is open: one at a time."),
    )
    policy = models.JSONField(_("policy"), help_text=_("The policy as it stood when the round began."))
    base_version = models.ForeignKey(
        MainModelVersion, verbose_name=_("base version"), on_delete=models.PROTECT, related_name="rounds_based_on"
    )
    candidate_version = models.OneToOneField(
        MainModelVersion,
        verbose_name=_("candidate version"),
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        related_name="made_by_round",
    )
    reason_code = models.CharField(_("reason code"), max_length=64, blank=True)
    reason = models.TextField(_("reason"), blank=True)
    eligible = models.PositiveIntegerField(_("eligible"), default=0)
    excluded = models.JSONField(_("left out"), default=dict, blank=True, help_text=_("{reason: learners}"))
    gate = models.JSONField(_("gate"), default=dict, blank=True, help_text=_("The comparison that decided."))
    performance_improvement = models.FloatField(_("performance improvement"), null=True, blank=True)
    deadline = models.DateTimeField(_("deadline"))
    idempotency_key = models.CharField(_("idempotency key"), max_length=200, null=True, blank=True, unique=True)
    job = models.ForeignKey(Job, verbose_name=_("job"), null=True, blank=True, on_delete=models.SET_NULL, related_name="rounds")
    requested_by = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        verbose_name=_("requested by"),
        null=True,
        blank=True,
        on_delete=models.SET_NULL,
        related_name="+",
    )
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)

    class Meta:
        verbose_name = _("aggregation round")
        verbose_name_plural = _("aggregation rounds")
        ordering = ("-sequence",)
        constraints = (
            models.CheckConstraint(condition=Q(state__in=RoundState.values), name="round_state_known"),
            models.CheckConstraint(
                condition=Q(state__in=[*TERMINAL_ROUND_STATES], open_slot__isnull=True, finished_at__isnull=False)
                | Q(state__in=[*OPEN_ROUND_STATES], open_slot=1, finished_at__isnull=True),
                name="round_open_slot_matches_state",
            ),
            models.CheckConstraint(
                condition=~Q(state=RoundState.PROMOTED) | Q(candidate_version__isnull=False), name="round_promoted_has_candidate"
            ),
        )

    def __str__(self) -> str:
        return str(self.sequence)

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL_ROUND_STATES


class FederatedUpdate(Row):
    """What a promoted round changed."""

    main_model_version = models.OneToOneField(
        MainModelVersion, verbose_name=_("main model version"), on_delete=models.PROTECT, related_name="federated_update"
    )
    base_version = models.ForeignKey(MainModelVersion, verbose_name=_("base version"), on_delete=models.PROTECT, related_name="+")
    round = models.OneToOneField(
        AggregationRound,
        verbose_name=_("round"),
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        related_name="federated_update",
    )
    aggregation_strategy = models.CharField(_("aggregation strategy"), max_length=24, choices=Strategy.choices)
    contributing_learners = models.JSONField(_("contributing learners"), default=list, help_text=_("Subject keys."))
    performance_improvement = models.FloatField(
        _("performance improvement"), help_text=_("Relative fall of the total loss on the gate's learners; positive is better.")
    )
    privacy_budget = models.FloatField(_("privacy budget ε"), null=True, blank=True)
    metadata = models.JSONField(_("metadata"), default=dict, blank=True)

    class Meta:
        verbose_name = _("federated update")
        verbose_name_plural = _("federated updates")
        ordering = ("-created_at",)

    def __str__(self) -> str:
        return str(self.main_model_version_id)


class ModelTrainingSession(Row):
    """One run of local training of one learner."""

    personalized_model = models.ForeignKey(
        PersonalizedModel, verbose_name=_("personalized model"), on_delete=models.CASCADE, related_name="training_sessions"
    )
    base_version = models.ForeignKey(
        MainModelVersion, verbose_name=_("base version"), on_delete=models.PROTECT, related_name="training_sessions"
    )
    round = models.ForeignKey(
        AggregationRound,
        verbose_name=_("round"),
        null=True,
        blank=True,
        on_delete=models.SET_NULL,
        related_name="training_sessions",
    )
    sequence = models.PositiveIntegerField(_("sequence"))
    purpose = models.CharField(_("purpose"), max_length=16, choices=SessionPurpose.choices)
    epochs = models.PositiveIntegerField(_("epochs"))
    batch_size = models.PositiveIntegerField(_("batch size"))
    samples = models.PositiveIntegerField(_("samples"))
    final_loss = models.FloatField(_("final loss"), null=True, blank=True)
    final_accuracy = models.FloatField(
        _("final accuracy"), null=True, blank=True, help_text=_("Content top-1 on the session's own held-out samples.")
    )
    head_metrics = models.JSONField(_("metrics per head"), default=dict, blank=True)
    delta_path = models.CharField(_("delta path"), max_length=300, blank=True)
    delta_sha256 = models.CharField(_("delta checksum"), max_length=64, blank=True)
    delta_norm = models.FloatField(_("delta norm"), null=True, blank=True)
    engine = models.CharField(_("engine"), max_length=16, choices=Engine.choices)
    backend = models.CharField(_("backend"), max_length=64, blank=True)
    proximal_mu = models.FloatField(_("proximal term μ"), default=0.0)
    clip_norm = models.FloatField(_("clipping norm C"), null=True, blank=True)
    noise_multiplier = models.FloatField(_("noise multiplier z"), null=True, blank=True)
    epsilon = models.FloatField(_("ε"), null=True, blank=True)
    delta = models.FloatField(_("δ"), null=True, blank=True)
    privacy_unit = models.CharField(_("privacy unit"), max_length=16, choices=PrivacyUnit.choices, blank=True)
    contributed_to_federation = models.BooleanField(_("contributed to federation"), default=False)
    federated_update = models.ForeignKey(
        FederatedUpdate,
        verbose_name=_("federated update"),
        null=True,
        blank=True,
        on_delete=models.SET_NULL,
        related_name="training_sessions",
    )
    metadata = models.JSONField(_("metadata"), default=dict, blank=True)
    duration = models.FloatField(_("duration in seconds"), default=0.0)

    class Meta:
        verbose_name = _("training session")
        verbose_name_plural = _("training sessions")
        ordering = ("-created_at",)
        indexes = (models.Index(fields=["personalized_model", "contributed_to_federation"], name="session_model_contributed"),)
        constraints = (
            models.UniqueConstraint(fields=["personalized_model", "sequence"], name="session_sequence_once"),
            models.UniqueConstraint(
                fields=["personalized_model", "round"],
                condition=Q(purpose=SessionPurpose.CONTRIBUTION, round__isnull=False),
                name="session_once_per_round",
            ),
            models.CheckConstraint(condition=Q(purpose__in=SessionPurpose.values), name="session_purpose_known"),
            models.CheckConstraint(condition=Q(samples__gte=1, epochs__gte=1, batch_size__gte=1), name="session_counts_positive"),
            models.CheckConstraint(
                condition=Q(delta_path="", delta_sha256="") | (~Q(delta_path="") & ~Q(delta_sha256="")),
                name="session_delta_has_checksum",
            ),
        )

    def __str__(self) -> str:
        return f"{self.personalized_model_id} {self.sequence}"


class Contribution(Row):
    """One learner's delta in a round, with its verdict."""

    round = models.ForeignKey(AggregationRound, verbose_name=_("round"), on_delete=models.CASCADE, related_name="contributions")
    subject_key = models.UUIDField(_("subject key"))
    sessions = models.ManyToManyField(ModelTrainingSession, verbose_name=_("sessions"), blank=True, related_name="contributions")
    upload_path = models.CharField(_("upload path"), max_length=300, blank=True)
    upload_sha256 = models.CharField(_("upload checksum"), max_length=64, blank=True)
    verdict = models.CharField(_("verdict"), max_length=16, choices=Verdict.choices, default=Verdict.PENDING)
    reason_code = models.CharField(_("reason code"), max_length=64, blank=True)
    reason = models.TextField(_("reason"), blank=True)
    samples = models.PositiveIntegerField(_("samples"), default=0)
    quality = models.FloatField(_("quality"), null=True, blank=True, help_text=_("Measured, never self-reported."))
    versions_behind = models.PositiveIntegerField(_("versions behind"), default=0)
    discount = models.FloatField(_("staleness discount"), default=1.0)
    norm = models.FloatField(_("norm"), null=True, blank=True)
    clipped_norm = models.FloatField(_("norm after clipping"), null=True, blank=True)
    weight = models.FloatField(_("weight"), default=0.0)

    class Meta:
        verbose_name = _("contribution")
        verbose_name_plural = _("contributions")
        ordering = ("subject_key",)
        indexes = (models.Index(fields=["round", "verdict"], name="contribution_verdict"),)
        constraints = (
            models.UniqueConstraint(fields=["round", "subject_key"], name="contribution_once"),
            models.CheckConstraint(condition=Q(verdict__in=Verdict.values), name="contribution_verdict_known"),
            models.CheckConstraint(condition=Q(weight__gte=0.0), name="contribution_weight_not_negative"),
            models.CheckConstraint(condition=Q(discount__gt=0.0, discount__lte=1.0), name="contribution_discount_bounds"),
        )

    def __str__(self) -> str:
        return f"{self.round_id} {self.subject_key}"


class PrivacyLedgerEntry(AppendOnlyRow):
    """One charge: everything needed to compute its ε again."""

    sequence = models.PositiveBigIntegerField(_("sequence"), unique=True)
    period = models.ForeignKey(PrivacyPeriod, verbose_name=_("privacy period"), on_delete=models.PROTECT, related_name="entries")
    round = models.ForeignKey(
        AggregationRound, verbose_name=_("round"), null=True, blank=True, on_delete=models.PROTECT, related_name="charges"
    )
    subject_key = models.UUIDField(
        _("subject key"), null=True, blank=True, db_index=True, help_text=_("Empty: the whole population is charged.")
    )
    mechanism = models.CharField(_("mechanism"), max_length=64)
    unit = models.CharField(_("unit"), max_length=16, choices=PrivacyUnit.choices)
    adjacency = models.CharField(_("adjacency"), max_length=24, choices=Adjacency.choices)
    sampling = models.CharField(_("sampling"), max_length=16, choices=Sampling.choices)
    q_num = models.PositiveBigIntegerField(_("sampling rate, numerator"), default=1)
    q_den = models.PositiveBigIntegerField(_("sampling rate, denominator"), default=1)
    noise_multiplier = models.FloatField(_("noise multiplier z"))
    clip_norm = models.FloatField(_("clipping norm C"))
    steps = models.PositiveBigIntegerField(_("steps T"))
    epsilon = models.FloatField(_("ε of this charge alone"))
    epsilon_total = models.FloatField(_("ε of the period after it"), help_text=_("Composition, never a sum."))
    delta = models.FloatField(_("δ"))
    accountant = models.CharField(_("accountant"), max_length=16)
    accountant_version = models.CharField(_("accountant's version"), max_length=64)
    conversion = models.CharField(_("conversion"), max_length=64)
    override_reason = models.TextField(_("reason of an override"), blank=True)

    class Meta:
        verbose_name = _("privacy ledger entry")
        verbose_name_plural = _("privacy ledger entries")
        ordering = ("-sequence",)
        constraints = (
            models.CheckConstraint(condition=Q(noise_multiplier__gt=0.0), name="ledger_noise_positive"),
            models.CheckConstraint(condition=Q(clip_norm__gt=0.0), name="ledger_clip_positive"),
            models.CheckConstraint(condition=Q(epsilon__gte=0.0, epsilon_total__gte=0.0), name="ledger_epsilon_not_negative"),
            models.CheckConstraint(condition=Q(delta__gt=0.0, delta__lt=1.0), name="ledger_delta_bounds"),
            models.CheckConstraint(condition=Q(q_den__gte=1, q_num__lte=F("q_den")), name="ledger_q_bounds"),
        )

    def __str__(self) -> str:
        return str(self.sequence)


class RoundAttempt(Row):
    """A round's n-th try at aggregating: one set, one charge, one noise draw."""

    round = models.ForeignKey(AggregationRound, verbose_name=_("round"), on_delete=models.CASCADE, related_name="attempts")
    n = models.PositiveIntegerField(_("attempt"))
    set_digest = models.CharField(_("digest of the set"), max_length=64)
    charge = models.OneToOneField(
        PrivacyLedgerEntry, verbose_name=_("charge"), null=True, blank=True, on_delete=models.PROTECT, related_name="attempt"
    )
    aggregate_path = models.CharField(_("aggregate path"), max_length=300, blank=True)
    aggregate_sha256 = models.CharField(_("aggregate checksum"), max_length=64, blank=True)
    contributions = models.PositiveIntegerField(_("contributions"), default=0)
    weight_total = models.FloatField(_("total weight"), default=0.0)
    aggregate_norm = models.FloatField(_("norm of the aggregate"), null=True, blank=True)

    class Meta:
        verbose_name = _("round attempt")
        verbose_name_plural = _("round attempts")
        ordering = ("round", "n")
        constraints = (
            models.UniqueConstraint(fields=["round", "n"], name="attempt_once"),
            models.CheckConstraint(condition=Q(n__gte=1), name="attempt_n_positive"),
            models.CheckConstraint(
                condition=Q(aggregate_path="", aggregate_sha256="") | (~Q(aggregate_path="") & ~Q(aggregate_sha256="")),
                name="attempt_aggregate_has_checksum",
            ),
        )

    def __str__(self) -> str:
        return f"{self.round_id} {self.n}"
