"""The console's doors: what each role sees, and actions that change nothing before they are confirmed."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from aivo_site.jobs.models import Job, JobLog, JobState
from aivo_site.jobs.services import run_here
from federation import strategies
from federation.models import AggregationRound, RoundState
from federation.policies import default_policy
from learners.models import Learner, Organisation, OrganisationMembership, Pool
from models_store.models import MainModelVersion, VersionStatus

pytestmark = pytest.mark.django_db

LEARNERS = "admin:learners_learner_changelist"
VERSIONS = "admin:models_store_mainmodelversion_changelist"


@pytest.fixture
def district() -> Organisation:
    return Organisation.objects.create(slug="district", name="District")


@pytest.fixture
def learners(district: Organisation) -> list[Learner]:
    return [
        Learner.objects.create(
            learner_id=f"learner-{number}",
            organisation=district,
            pool=Pool.FEDERATED,
            consent_training=number != 2,
            consent_contribution=True,
        )
        for number in range(3)
    ]


def _user(name: str, *groups: str, **fields: Any) -> User:
    user = User.objects.create_user(name, password="long-enough-for-tests", is_staff=True, **fields)
    user.groups.set(Group.objects.filter(name__in=groups))
    return user


def _signed_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def _version(sequence: int, status: str) -> MainModelVersion:
    return MainModelVersion.objects.create(
        version=f"aivo-main-v{sequence}",
        sequence=sequence,
        status=status,
        model_path=f"aivo-main-v{sequence}",
        manifest_sha256="0" * 64,
        encoder_sha256="1" * 64,
    )


def _selection(action: str, rows: list[Any]) -> dict[str, Any]:
    return {"action": action, "_selected_action": [str(row.pk) for row in rows]}


def _token(content: bytes) -> str:
    found = re.search(rb'name="token" value="([0-9a-f-]{36})"', content)
    assert found, "the page carries no token"
    return found.group(1).decode()


def test_an_action_first_says_what_will_happen_and_starts_nothing(learners: list[Learner]) -> None:
    client = _signed_in(_user("op", "Operator"))
    page = client.post(reverse(LEARNERS), _selection("clone_models", learners))
    assert page.status_code == 200
    text = page.content.decode()
    assert "2 learners get a copy" in text
    assert "1 learner is left out" in text
    assert not Job.objects.exists()


def test_pressing_the_button_twice_starts_one_job(learners: list[Learner]) -> None:
    client = _signed_in(_user("op", "Operator"))
    first = client.post(reverse(LEARNERS), _selection("clone_models", learners))
    confirmed = {**_selection("clone_models", learners), "confirmed": "yes", "token": _token(first.content)}
    answers = [client.post(reverse(LEARNERS), confirmed) for _ in range(2)]
    job = Job.objects.get()
    assert job.kind == "clone_learner_models"
    assert sorted(job.params["learner_ids"]) == sorted(str(learner.pk) for learner in learners)
    assert {answer["Location"] for answer in answers} == {reverse("admin:jobs_job_change", args=[job.pk])}


def test_a_confirmation_without_its_page_starts_nothing(learners: list[Learner]) -> None:
    client = _signed_in(_user("op", "Operator"))
    client.post(reverse(LEARNERS), {**_selection("clone_models", learners), "confirmed": "yes"})
    assert not Job.objects.exists()


def test_an_auditor_sees_and_cannot_start_or_change(learners: list[Learner]) -> None:
    client = _signed_in(_user("auditor", "Auditor"))
    assert client.get(reverse(LEARNERS)).status_code == 200
    client.post(reverse(LEARNERS), {**_selection("train_models", learners), "confirmed": "yes", "token": "0" * 8})
    page = client.post(reverse(LEARNERS), _selection("train_models", learners), follow=True)
    assert "You may not do this" in page.content.decode()
    assert not Job.objects.exists()
    learner = learners[0]
    change = reverse("admin:learners_learner_change", args=[learner.pk])
    assert client.get(change).status_code == 200
    assert client.post(change, {"learner_id": "renamed"}).status_code == 403


def test_an_operator_of_one_organisation_sees_only_its_learners(learners: list[Learner]) -> None:
    other = Organisation.objects.create(slug="other", name="Other")
    theirs = Learner.objects.create(learner_id="theirs", organisation=other)
    user = _user("scoped", "Operator")
    OrganisationMembership.objects.create(user=user, organisation=other)
    client = _signed_in(user)
    text = client.get(reverse(LEARNERS)).content.decode()
    assert "theirs" in text
    assert "learner-0" not in text
    assert client.get(reverse("admin:learners_learner_change", args=[learners[0].pk])).status_code == 302
    page = client.post(reverse(LEARNERS), _selection("clone_models", [theirs, learners[0]]))
    assert b"1 row is selected" in page.content


@pytest.mark.parametrize(
    ("action", "status", "words"),
    [
        ("aggregate", VersionStatus.ARCHIVED, "is not active"),
        ("promote", VersionStatus.ACTIVE, "can be promoted"),
        ("promote", VersionStatus.DEPRECATED, "can be promoted"),
        ("roll_back", VersionStatus.CANDIDATE, "can be made active again"),
    ],
)
def test_an_action_on_the_wrong_version_says_which_are_allowed(action: str, status: str, words: str) -> None:
    row = _version(1, status)
    client = _signed_in(_user("op", "Operator"))
    page = client.post(reverse(VERSIONS), _selection(action, [row]), follow=True)
    assert words in page.content.decode()
    assert not Job.objects.exists()


def test_promotion_needs_a_reason_and_keeps_it() -> None:
    row = _version(1, VersionStatus.CANDIDATE)
    client = _signed_in(_user("op", "Operator"))
    token = _token(client.post(reverse(VERSIONS), _selection("promote", [row])).content)
    confirmed = {**_selection("promote", [row]), "confirmed": "yes", "token": token}
    assert client.post(reverse(VERSIONS), {**confirmed, "reason": ""}).status_code == 200
    assert not Job.objects.exists()
    client.post(reverse(VERSIONS), {**confirmed, "reason": "better for every school"})
    assert Job.objects.get().params == {"version": "aivo-main-v1", "reason": "better for every school"}


def test_the_progress_of_a_job_comes_as_json_with_new_lines_only() -> None:
    client = _signed_in(_user("auditor", "Auditor"))
    job = Job.objects.create(kind="train_main_model", queue="training", progress_done=2, progress_total=10)
    lines = [JobLog.objects.create(job=job, message=text) for text in ("one", "two")]
    answer = client.get(reverse("admin:jobs_job_progress", args=[job.pk]), {"after": lines[0].pk}).json()
    assert (answer["state"], answer["done"], answer["total"], answer["terminal"]) == ("QUEUED", 2, 10, False)
    assert [line["message"] for line in answer["log"]] == ["two"]
    assert "No worker of the queue" in answer["notice"]


def test_cancelling_is_a_post_of_someone_who_may() -> None:
    job = Job.objects.create(kind="train_main_model", queue="training")
    cancel = reverse("admin:jobs_job_cancel", args=[job.pk])
    operator, auditor = _signed_in(_user("op", "Operator")), _signed_in(_user("auditor", "Auditor"))
    assert operator.get(cancel).status_code == 405
    assert auditor.post(cancel).status_code == 403
    job.refresh_from_db()
    assert job.state == JobState.QUEUED
    operator.post(cancel)
    job.refresh_from_db()
    assert job.state == JobState.CANCELLED


def test_the_queue_library_has_no_pages_of_its_own() -> None:
    client = _signed_in(_user("root", is_superuser=True))
    for name in ("schedule", "ormq", "success", "failure"):
        assert client.get(f"/admin/django_q/{name}/").status_code == 404


def test_every_action_of_every_list_ignores_get(learners: list[Learner]) -> None:
    client = _signed_in(_user("root", is_superuser=True))
    _version(1, VersionStatus.ACTIVE)
    for url, actions in ((LEARNERS, ("clone_models", "train_models")), (VERSIONS, ("aggregate", "promote", "roll_back"))):
        for action in actions:
            client.get(reverse(url), {"action": action, "_selected_action": "x", "confirmed": "yes"})
    assert not Job.objects.exists()


def _policy_form(client: Client, url: str) -> dict[str, Any]:
    form = client.get(url).context["adminform"].form
    return {name: value for name in form.fields if (value := form[name].value()) is not None and value is not False}


def test_a_policy_that_no_round_could_run_is_refused_where_it_is_written() -> None:
    policy = default_policy()
    client = _signed_in(_user("op", "Operator"))
    url = reverse("admin:federation_federationpolicy_change", args=[policy.pk])
    values = {**_policy_form(client, url), "strategy_parameters": "{}", "guarded_metrics": "{}"}
    for wrong, words in (
        ({"differential_privacy": "on"}, "privacy"),
        ({"server_learning_rate": "0"}, "1e-06"),
        ({"contribution_source": "sessions", "adaptation": "difficulty_bias"}, "difficulty_bias"),
    ):
        page = client.post(url, {**values, **wrong})
        assert page.status_code == 200
        assert words in page.content.decode()
        policy.refresh_from_db()
        assert (policy.differential_privacy, policy.server_learning_rate, policy.contribution_source) == (False, 1.0, "round")
    offered = [choice[0] for choice in client.get(url).context["adminform"].form.fields["strategy"].choices]
    assert offered == list(strategies.names())
    saved = client.post(url, {**values, "minimum_learners": "8"})
    assert saved.status_code == 302, saved.context["adminform"].form.errors
    policy.refresh_from_db()
    assert policy.minimum_learners == 8


def test_a_waiting_round_is_decided_with_a_reason_by_someone_who_may() -> None:
    base, candidate = _version(1, VersionStatus.ACTIVE), _version(2, VersionStatus.CANDIDATE)
    waiting = AggregationRound.objects.create(
        sequence=1,
        state=RoundState.AWAITING_DECISION,
        policy={},
        base_version=base,
        candidate_version=candidate,
        deadline=timezone.now() + timedelta(days=1),
    )
    url = reverse("admin:federation_aggregationround_changelist")
    auditor = _signed_in(_user("auditor", "Auditor"))
    assert "You may not do this" in auditor.post(url, _selection("reject_candidate", [waiting]), follow=True).content.decode()
    client = _signed_in(_user("op", "Operator"))
    token = _token(client.post(url, _selection("reject_candidate", [waiting])).content)
    confirmed = {**_selection("reject_candidate", [waiting]), "confirmed": "yes", "token": token}
    client.post(url, {**confirmed, "reason": "worse for the youngest"})
    job = Job.objects.get()
    assert (job.kind, job.params["decision"]) == ("decide_round", "reject")
    run_here(job=job)
    waiting.refresh_from_db()
    candidate.refresh_from_db()
    assert (waiting.state, candidate.status) == (RoundState.REJECTED, VersionStatus.REJECTED)
    assert "worse for the youngest" in waiting.reason
