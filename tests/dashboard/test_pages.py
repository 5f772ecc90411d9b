"""The pages in a real browser: live curves, comparison, keyboard, both themes, a phone, a service that is away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from tests.dashboard.browser import Browser
from tests.support.published import publish_agent, publish_model
from tests.support.stage import (
    RECOVERY,
    Stage,
    agent_plan,
    begin,
    measures,
    pretraining,
    stage,
    submit,
    tell,
)
from training_common.jobs.folders import log_name
from training_common.jobs.states import JobState

CARD = b"# Card\n\nA **model** of `tests`.\n\n| metric | value |\n| --- | --- |\n| loss | 3.1 |\n\n- one\n- two\n"


def fill(running: Stage) -> tuple[str, str]:
    """Publish two models and two agents, and run a job of each service. Returns the jobs' ids."""
    store = running.store()
    jobs = []
    for seed in range(2):
        jobs.append(submit(store, pretraining(40)))
        attempt = begin(store)
        for step in range(1, 41):
            tell(attempt, step, 40, measures(step, 40, seed))
        attempt.move(JobState.FAILED, message="only its curves are needed")
    live = submit(store, pretraining(400))
    attempt = begin(store)
    for step in range(1, 61):
        tell(attempt, step, 400, measures(step, 400))
    attempt.add_checkpoint(step=60, digest=f"sha256:{'c' * 64}", size_bytes=300_000_000, folder="c", score=4.5)
    attempt.append("note", RECOVERY)
    submit(store, pretraining())
    publish(running, jobs)
    agents = running.store("agent")
    agent_job = submit(agents, agent_plan())
    attempt = begin(agents)
    for step in range(1, 30):
        tell(attempt, step, 200, {"loss": 2 / step, "train_accuracy": step / 40, "learning_rate": 1e-4})
    for opened in (store, agents):
        opened.database.close()
    return live.removeprefix("jobs/"), agent_job.removeprefix("jobs/")


def publish(running: Stage, jobs: list[str]) -> None:
    data = [{"name": "forge-arithmetic", "kind": "generated", "rows": 2000, "digest": f"sha256:{'d' * 64}"}]
    for number, job in enumerate(jobs):
        checks = [{"name": "memory_helps", "integrity": False, "value": 0.02, "passed": number > 0, "detail": "gain"}]
        publish_model(
            running.folder / "cognate",
            payload=b"w" * (1000 + number),
            training={"steps": 40 + number, "tokens": 819_200},
            data=data,
            checks=checks,
            job=job,
        )
        publish_agent(running.folder / "agent", foundation="cognate-25m@1")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stage, str, str]]:
    """Yield services with something of everything, and the ids of a job of each; no test changes them."""
    with stage(tmp_path_factory.mktemp("shown")) as running:
        yield running, *fill(running)


def pages(job: str, agent_job: str) -> dict[str, str]:
    """Return every page, and words that it shows when it is whole."""
    return {
        "/": "Newest jobs",
        "/jobs?service=cognate": "cognate-25m",
        f"/jobs/cognate/{job}": "Tokens by ponder steps",
        f"/jobs/agent/{agent_job}": "Accuracy",
        "/models": "cognate-25m@2",
        "/models/cognate-25m@2": "forge-arithmetic",
        "/agents": "intent-router@1",
        "/agents/intent-router@1": "cognate-25m@1",
        "/compare/models?a=cognate-25m@1&b=cognate-25m@2": "Mean ponder steps",
        "/compare/agents?a=intent-router@1&b=intent-router@2": "Fields",
        "/resources": "Nothing is reserved",
        "/alerts": "Active",
        "/nowhere": "Not found",
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_page_has_a_serious_flaw_for_people_who_do_not_see_it(
    shown: tuple[Stage, str, str], browser: Browser, theme: str
) -> None:
    """axe-core on every page, in both themes, with everything unfolded; nothing in the console."""
    running, job, agent_job = shown
    browser.pardoned.append("/nowhere")
    browser.open(running.url)
    browser.theme(theme)
    for path, words in pages(job, agent_job).items():
        browser.open(running.url + path)
        browser.until_text(words)
        browser.js("for (const details of document.querySelectorAll('details')) details.open = true")
        assert [] == browser.violations(), path
        assert theme == browser.js("return document.documentElement.dataset.theme")
        assert [] == browser.errors(), path


def test_every_page_fits_a_phone(shown: tuple[Stage, str, str], browser: Browser) -> None:
    """Nothing makes the page wider than the screen: wide tables scroll for themselves."""
    running, job, agent_job = shown
    browser.pardoned.append("/nowhere")
    browser.phone()
    for path, words in pages(job, agent_job).items():
        browser.open(running.url + path)
        browser.until_text(words)
        assert 390 == browser.js("return document.documentElement.scrollWidth"), path


def test_the_keyboard_alone_leads_to_a_jobs_numbers(shown: tuple[Stage, str, str], browser: Browser) -> None:
    """Skip link, navigation with a place for the focus, the list, a job, its values as a table."""
    running, job, _ = shown
    browser.open(running.url)
    browser.until_text("Newest jobs")
    press = browser.driver.switch_to.active_element.send_keys
    press(Keys.TAB)
    assert "Skip to content" == browser.js("return document.activeElement.textContent")
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert "main" == browser.js("return document.activeElement.id")
    browser.js("document.querySelector('#nav a[href=\"/jobs\"]').focus()")
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    browser.until_text("Submitted")
    assert "main" == browser.until(lambda: browser.js("return document.activeElement.id"))
    assert "page" == browser.js("return document.querySelector('#nav a[href=\"/jobs\"]').getAttribute('aria-current')")
    browser.js("document.querySelector(`main a[href$='${arguments[0]}']`).focus()", job)
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    browser.until_text("Loss")
    browser.js("document.querySelector('.chart summary').focus()")
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    browser.until_text("validation, memory off", ".chart table")


def test_a_curve_grows_and_a_recovery_appears_without_a_reload(here: Stage, browser: Browser) -> None:
    """What a worker tells is on the open page within a moment: the value, the picture's words, the mark, the state."""
    store = here.store()
    job = submit(store, pretraining(100)).removeprefix("jobs/")
    browser.open(f"{here.url}/jobs/cognate/{job}")
    browser.until_text("Nothing was measured yet")
    browser.js("window.sameDocument = true")
    attempt = begin(store)
    for step in range(1, 21):
        tell(attempt, step, 100, {"loss": 9.0 - step / 4, "halting_histogram": [0.75, 0.25]})
    browser.until_text("20 of 100 steps")
    browser.until_text("4 nats/token")
    browser.until_text("Running")
    browser.until_text("75 %", ".bars")
    first = browser.js("return document.querySelector('.plot').getAttribute('aria-label')")
    assert "steps 1 to 20, now 4 nats/token, lowest 4, highest 8.75" in first
    tell(attempt, 21, 100, {"loss": float("inf")})
    attempt.append("note", RECOVERY)
    for step in range(15, 31):
        tell(attempt, step, 100, {"loss": 3.5})
    browser.until_text("loss_trend, restart_slow_gradient")
    browser.until_text("30 of 100 steps")
    browser.until_text("3.5 nats/token")
    grown = browser.js("return document.querySelector('.plot').getAttribute('aria-label')")
    assert "steps 1 to 30, now 3.5 nats/token" in grown
    attempt.move(JobState.FAILED, message="enough")
    browser.until_text("Failed", ".title")
    assert browser.js("return window.sameDocument")
    store.database.close()


def test_two_models_are_compared(shown: tuple[Stage, str, str], browser: Browser) -> None:
    """Chosen in the list; their curves in one plot, what differs with its difference, and on demand all of it."""
    running, _, _ = shown
    browser.open(f"{running.url}/models")
    for name in ("cognate-25m@1", "cognate-25m@2"):
        browser.find(f"input[value='{name}']").click()
    browser.find("button.primary").click()
    browser.until_text("Mean ponder steps")
    assert browser.driver.current_url.endswith("/compare/models?a=cognate-25m%401&b=cognate-25m%402")
    label = browser.js("return document.querySelector('.plot').getAttribute('aria-label')")
    assert "cognate-25m@1: steps 1 to 40" in label
    assert "cognate-25m@2: steps 1 to 40" in label
    rows = browser.text("table tbody, section table")
    assert "training steps\t40\t41\t+1" in rows
    assert "training tokens" not in rows
    browser.find("input[type='checkbox']").click()
    browser.until_text("training tokens\t819,200\t819,200\tsame", "section table")


def test_a_service_that_is_away_is_told_and_comes_back_without_a_reload(here: Stage, browser: Browser) -> None:
    """Since when, and why; a job's page goes on where it was."""
    browser.pardoned.append("503")
    store = here.store()
    job = submit(store, pretraining(100)).removeprefix("jobs/")
    attempt = begin(store)
    tell(attempt, 1, 100, {"loss": 9.0})
    browser.open(f"{here.url}/jobs/cognate/{job}")
    browser.until_text("1 of 100 steps")
    browser.js("window.sameDocument = true")
    address = here.run(here.stop_service("cognate"))
    browser.until_text("Cognate pretraining is away since", "#notices")
    tell(attempt, 2, 100, {"loss": 8.0})
    here.run(here.start_service("cognate", address))
    browser.until(lambda: not browser.text("#notices"), "no notice")
    browser.until_text("2 of 100 steps")
    assert browser.js("return window.sameDocument")
    store.database.close()


def test_a_job_is_paused_by_a_button_that_asks_first(here: Stage, browser: Browser) -> None:
    """Nothing happens before the question is answered; the page then shows what the service says."""
    store = here.store()
    job = submit(store, pretraining(100))
    browser.open(f"{here.url}/jobs/cognate/{job.removeprefix('jobs/')}")
    browser.find(".title .actions button").click()
    browser.find("dialog .actions button").click()
    assert "QUEUED" == store.get(job).state
    browser.until(lambda: browser.js("return !document.querySelector('dialog')"))
    browser.find(".title .actions button").click()
    browser.until_text("Pause job", "dialog")
    browser.find("dialog button.primary").click()
    browser.until_text("Paused", ".title")
    assert "PAUSED" == store.get(job).state
    browser.until_text("Resume", ".title .actions")
    store.database.close()


def test_a_role_that_may_not_steer_is_told_so(tmp_path: Path, browser: Browser) -> None:
    """The service decides: its refusal is shown, and the job is as it was."""
    browser.pardoned.append("403")
    with stage(tmp_path, actions=True, security={"local_roles": ["viewer"]}) as running:
        store = running.store()
        job = submit(store, pretraining(100))
        browser.open(f"{running.url}/jobs/cognate/{job.removeprefix('jobs/')}")
        browser.find(".title .actions button.danger").click()
        browser.find("dialog button.danger").click()
        browser.until_text("ROLE_MISSING", "dialog")
        assert "QUEUED" == store.get(job).state
        store.database.close()
        browser.open("about:blank")


def test_a_page_that_only_reads_offers_nothing(shown: tuple[Stage, str, str], browser: Browser) -> None:
    """Without --actions there is no button."""
    running, job, _ = shown
    browser.open(f"{running.url}/jobs/cognate/{job}")
    browser.until_text("Tokens by ponder steps")
    assert 0 == browser.js("return document.querySelectorAll('.title .actions button').length")


def test_text_of_a_service_is_never_markup(here: Stage, browser: Browser) -> None:
    """What a caller, a note or a worker's log says is shown as it is, and an endless line as far as it is of use."""
    store = here.store()
    job = submit(store, pretraining(100), caller="<img src=x onerror=window.hit=1>")
    attempt = begin(store)
    attempt.append("note", {"kind": "<b>", "message": "<svg onload=window.hit=2>", "facts": {"step": "<i>"}})
    log = here.folder / "cognate" / "jobs" / log_name(job, 1)
    log.parent.mkdir(parents=True)
    log.write_text("<script>window.hit=3</script>\n\x1b[31mred\x1b[0m\n" + "=" * 100_000 + "\nnext line\n")
    browser.open(f"{here.url}/jobs")
    browser.until_text("cognate-25m")
    browser.js("document.querySelector('main table a').click()")
    browser.until_text("<img src=x onerror=window.hit=1>")
    browser.until_text("<svg onload=window.hit=2>")
    browser.find("details summary h2").click()
    browser.until_text("next line", ".log")
    assert "<script>window.hit=3</script>\n" in browser.text(".log")
    assert 20_000 <= len(browser.text(".log")) <= 20_200
    assert browser.js("return window.hit") is None
    store.database.close()
