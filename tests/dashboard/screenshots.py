"""Takes the pictures of docs/dashboard.md of real services and jobs. It takes some minutes.

Two models are pretrained for a few steps and an agent is made; then a third pretraining runs, loses its worker once,
and is shown while it goes on.
Usage: python -m tests.dashboard.screenshots [folder]
"""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from pathlib import Path

from cognateforge.agent.v1 import training_pb2 as agent_v1
from cognateforge.client import AgentClient, CognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as cognate_v1
from cognateforge.job.v1 import job_pb2
from deploy.services import Services
from tests.dashboard.browser import Browser, chromium
from tests.dashboard.test_real_job import dashboard, worker_of

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"
# The third job: its worker is killed after the first, and the pictures are taken after the second.
STEPS, KILLED_AFTER, SHOWN_AFTER = 240, 70, 180


def start(cognate: CognateClient, steps: int, seed: int) -> str:
    plan = cognate_v1.PretrainingPlan(
        total_steps=steps, seed=seed, batch_size=2, sequence_length=64, checkpoint_interval_steps=40
    )
    request = cognate_v1.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
    return cognate.pretraining.StartPretraining(request).job.job.name


def until_done(client: CognateClient | AgentClient, job: str) -> None:
    for frame in client.watch_job(job):
        if frame.HasField("end") and frame.end.state != job_pb2.JOB_STATE_SUCCEEDED:
            raise RuntimeError(f"{job} ended: {frame.end}")


def until_step(cognate: CognateClient, job: str, step: int) -> None:
    for frame in cognate.watch_job(job):
        if frame.event.progress.step >= step:
            return


def make_agent(agents: AgentClient) -> None:
    plan = agent_v1.TrainingPlan(
        agent="intent-router",
        architecture="recurrent",
        scratch=agent_v1.ScratchBase(),
        classification=agent_v1.ClassificationTask(generated=agent_v1.GeneratedSource(seed=1)),
        adaptation=agent_v1.Adaptation(full=agent_v1.FullAdaptation()),
        optimization=agent_v1.Optimization(adamw=agent_v1.AdamW(), peak_learning_rate=2e-3),
        total_steps=200,
    )
    request = agent_v1.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
    until_done(agents, agents.training.StartTraining(request).job.job.name)


def take(browser: Browser, folder: Path, url: str, job: str) -> None:
    """Take every picture; `job` runs meanwhile."""
    pages = {
        "job": (f"jobs/cognate/{job.removeprefix('jobs/')}", "Tokens by ponder steps"),
        "overview": ("", "Newest jobs"),
        "compare": ("compare/models?a=cognate-25m@1&b=cognate-25m@2", "Mean ponder steps"),
    }
    browser.open(url)
    for theme in ("light", "dark"):
        browser.theme(theme)
        for name, (path, words) in pages.items():
            if theme == "light" or name == "job":
                shoot(browser, folder / f"dashboard-{name}-{theme}.png", url + path, words)
    browser.theme("light")
    browser.phone()
    shoot(browser, folder / "dashboard-overview-phone.png", url, "Newest jobs")


def shoot(browser: Browser, file: Path, url: str, words: str) -> None:
    browser.open(url)
    browser.until_text(words)
    browser.until_text("live", "#live")
    # Twice a frame: what was put into the document is drawn then.
    browser.driver.execute_async_script(
        "const done = arguments[0]; setTimeout(() => requestAnimationFrame(done), 1000);"
    )
    browser.driver.save_screenshot(str(file))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.pop("FORGE_DATA", None)
    os.environ["COGNATE_SERVER_PRETRAINING__REASONING_PROBLEMS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        services = Services(Path(name))
        try:
            first, second = services.start_both(cognate="127.0.0.1:0", agent="127.0.0.1:0")
            with (
                CognateClient(first.address) as cognate,
                AgentClient(second.address) as agents,
                dashboard(first.address, second.address) as url,
            ):
                for seed, steps in enumerate((40, 80)):
                    until_done(cognate, start(cognate, steps, seed))
                make_agent(agents)
                job = start(cognate, STEPS, 2)
                start(cognate, STEPS, 3)
                until_step(cognate, job, KILLED_AFTER)
                worker_of(job).kill()
                until_step(cognate, job, SHOWN_AFTER)
                browser = chromium(Path(name) / "profile")
                try:
                    browser.driver.set_window_size(1280, 1180)
                    take(browser, folder, url, job)
                finally:
                    browser.driver.quit()
        finally:
            services.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
