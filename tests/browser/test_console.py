"""An operator's clicks in a real Chromium against a real server and real workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Installation

pytestmark = pytest.mark.browser

JOB_MILLISECONDS = 120_000
CONFIRM = "form[data-once] button[type=submit]"
PICTURES = os.environ.get("BROWSER_PICTURES", "")


def _picture(page: Page, name: str) -> None:
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"), full_page=True)


def _choose(page: Page, action: str) -> None:
    page.select_option("select[name=action]", label=action)
    page.click("button[title='Run the selected action']")
    expect(page.locator("h1", has_text=action)).to_be_visible()


def _tick(page: Page, row: int = 0) -> None:
    page.locator("input.action-select").nth(row).check()


def _wait_for_state(page: Page, text: str) -> None:
    expect(page.locator("#job-progress [data-state]")).to_have_text(text, timeout=JOB_MILLISECONDS)


def test_every_list_opens_and_shows_what_the_demo_left(page: Page) -> None:
    for path, something in {
        "learners/learner": "demo-",
        "models_store/mainmodelversion": "aivo-main-v1",
        "models_store/personalizedmodel": "demo-",
        "federation/aggregationround": "1",
        "federation/modeltrainingsession": "demo-",
        "federation/contribution": "accepted",
        "federation/federationpolicy": "default",
        "jobs/job": "train_main_model",
        "audit/auditevent": "1",
    }.items():
        page.goto(f"/admin/{path}/")
        expect(page.locator("#content")).to_contain_text(something)
        _picture(page, path.replace("/", "-"))


def test_every_page_of_a_row_opens(page: Page) -> None:
    page.goto("/admin/")
    lists = page.evaluate("[...document.querySelectorAll('a[href^=\"/admin/\"]')].map(link => link.getAttribute('href'))")
    places = sorted({href for href in lists if href.count("/") == 4})
    assert len(places) >= 20
    opened = 0
    for place in places:
        page.goto(place)
        row = page.locator("#result_list tbody th a, #result_list tbody td a").first
        if row.count() == 0:
            continue
        page.goto(row.get_attribute("href") or "")
        expect(page.locator("#content")).to_be_visible()
        _picture(page, f"row{place.replace('/', '-')}")
        opened += 1
    assert opened >= 14


def test_an_operator_trains_two_learners_and_follows_the_job(page: Page) -> None:
    page.goto("/admin/learners/learner/?pool__exact=FEDERATED")
    _tick(page, 0)
    _tick(page, 1)
    _choose(page, "Train their own models…")
    expect(page.locator("h2", has_text="What will happen")).to_be_visible()
    _picture(page, "confirm-train")
    page.click(CONFIRM)
    page.wait_for_url("**/admin/jobs/job/**")
    _wait_for_state(page, "done")
    expect(page.locator("[data-result]")).to_contain_text("trained")
    _picture(page, "job-done")


def test_a_dry_run_of_a_round_says_who_would_take_part(page: Page) -> None:
    page.goto("/admin/models_store/mainmodelversion/?status__exact=ACTIVE")
    _tick(page)
    _choose(page, "Start a round from the active version…")
    page.check("input[name=dry_run]")
    _picture(page, "confirm-round")
    page.click(CONFIRM)
    page.wait_for_url("**/admin/jobs/job/**")
    _wait_for_state(page, "done")
    expect(page.locator("[data-result]")).to_contain_text("eligible")


def test_rollback_and_promotion_need_a_reason_and_then_move_the_active_version(page: Page, installation: Installation) -> None:
    page.goto("/admin/models_store/mainmodelversion/?status__exact=ARCHIVED")
    if page.locator("input.action-select").count() == 0:
        pytest.fail("the demo left no archived version to roll back to")
    _tick(page)
    _choose(page, "Roll back to this version…")
    page.click(CONFIRM)
    assert "/jobs/job/" not in page.url, "a rollback without a reason must not start"
    page.fill("textarea[name=reason]", "the newer version recommends too hard tasks")
    _picture(page, "confirm-rollback")
    page.click(CONFIRM)
    page.wait_for_url("**/admin/jobs/job/**")
    _wait_for_state(page, "done")
    assert '"active_version": "aivo-main-v1"' in installation.manage("federation_status", "--json")


def test_an_action_on_the_wrong_version_is_refused_in_words(page: Page) -> None:
    page.goto("/admin/models_store/mainmodelversion/?status__exact=ACTIVE")
    _tick(page)
    page.select_option("select[name=action]", label="Promote…")
    page.click("button[title='Run the selected action']")
    expect(page.locator("body")).to_contain_text("Only a version that waits for a decision or was rejected can be promoted")


def test_the_pages_hold_in_dark_mode_and_on_a_phone(page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto("/admin/jobs/job/")
    page.goto(page.locator("#result_list tbody a").first.get_attribute("href") or "")
    expect(page.locator("#job-progress")).to_be_visible()
    expect(page.locator("#job-progress [data-state]")).to_have_text("done")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1"), "the page scrolls sideways on a phone"
    _picture(page, "job-phone-dark")
