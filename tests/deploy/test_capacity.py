"""The simulator of capacities is held to theory, its page to its answers, and its figures to their sources."""

import functools
import heapq
import json
import math
import random
import re
import time
import tomllib
from pathlib import Path

import pytest

from cognate_server.settings import CognateSettings
from tools import capacity, capacity_doc, capacity_model
from tools.capacity_model import MEASURED_FILE, MOST_SLOTS, Measured, Scale
from tools.capacity_queue import Arrivals, Course, erlang_c, follow, mean_wait_s, simulate
from training_common.settings import WorkerSettings
from training_common.telemetry.catalog import CATALOG

ROOT = Path(__file__).resolve().parents[2]
PAGE = capacity_doc.TARGET.read_text(encoding="utf-8")
JOBS = 40_000


@pytest.fixture(scope="module")
def measured() -> Measured:
    return Measured.load()


def quick(name: str, *changes: str) -> Scale:
    """Return a scale for tests that do not look at its waits."""
    return capacity.load_scale(name, ["simulated_jobs=500", *changes])


@functools.cache
def random_jobs(servers: int, offered_share: float, *, slots: int = 1) -> Course:
    """Simulate M/M/c with a mean service of a second, once for all tests."""
    rate = offered_share * servers
    arrivals = Arrivals(
        between_s=lambda chance: chance.expovariate(rate), holds_s=lambda chance: chance.expovariate(1), slots=slots
    )
    return simulate(arrivals, slots=servers * slots, jobs=JOBS, seed=1)


# Where few jobs wait, these few come together, and their mean scatters by more.
@pytest.mark.parametrize(("servers", "offered_share", "tolerance"), [(1, 0.6, 0.1), (4, 0.7, 0.1), (20, 0.8, 0.3)])
def test_waits_are_those_of_erlang_c(servers: int, offered_share: float, tolerance: float) -> None:
    """Of jobs with exponential times the mean wait, the share that waits and the quantiles are those of M/M/c."""
    course = random_jobs(servers, offered_share)
    expected_s = mean_wait_s(servers, rate=offered_share * servers, service_s=1.0)
    assert course.mean_wait_s == pytest.approx(expected_s, rel=tolerance)
    waiting = erlang_c(servers, offered_share * servers)
    assert sum(wait > 0 for wait in course.waits_s) / len(course.waits_s) == pytest.approx(waiting, rel=tolerance)
    # P(W > t) = C exp(-(c - a) t)
    p90 = max(0.0, math.log(waiting / 0.1) / (servers - offered_share * servers))
    assert course.wait_quantile_s(0.9) == pytest.approx(p90, rel=tolerance)


def test_every_wait_is_that_of_the_recursion() -> None:
    """Job by job, the simulation is Kiefer and Wolfowitz's recursion over the moments at which slots are free."""
    chance = random.Random(3)  # noqa: S311 - of arrivals
    jobs = [(chance.expovariate(2.4), chance.expovariate(1)) for _ in range(2000)]
    free, moment, expected = [0.0, 0.0, 0.0], 0.0, []
    for between_s, holds_s in jobs:
        moment += between_s
        begins = max(moment, heapq.heappop(free))
        heapq.heappush(free, begins + holds_s)
        expected.append(begins - moment)
    assert follow(jobs, slots=3).waits_s == pytest.approx(expected)


def test_erlang_c_is_that_of_the_textbook() -> None:
    """The sum of the definition, term by term, gives the same as the recursion."""
    for servers, offered in ((1, 0.5), (3, 2.0), (10, 7.5)):
        terms = [offered**n / math.factorial(n) for n in range(servers)]
        last = offered**servers / math.factorial(servers) * servers / (servers - offered)
        assert erlang_c(servers, offered) == pytest.approx(last / (sum(terms) + last))
    assert mean_wait_s(2, rate=2, service_s=1) == math.inf


@pytest.mark.parametrize(("servers", "offered_share"), [(1, 0.6), (20, 0.8)])
def test_jobs_present_are_arrivals_times_time(servers: int, offered_share: float) -> None:
    """Little's law holds of what waits and runs, and of what runs."""
    course = random_jobs(servers, offered_share)
    sojourn_s = sum(course.sojourns_s) / len(course.sojourns_s)
    assert course.mean_present() == pytest.approx(course.arrival_rate * sojourn_s, rel=0.02)
    assert course.mean_running() == pytest.approx(offered_share * servers, rel=0.03)


def test_waits_follow_the_spread_of_the_times() -> None:
    """One slot, jobs whose times are all alike or spread twice their mean: the waits are Pollaczek and Khinchine's."""
    for spread in (0.0, 1.5):
        values = {"nodes": 1, "jobs_per_day": 12, "job_hours": 1.0, "step_s": 1.0, "simulated_jobs": JOBS}
        course = capacity._simulated(Scale(**values, job_hours_spread=spread), 3600.0)  # type: ignore[arg-type]
        expected_s = 0.5 / (1 - 0.5) * (1 + spread**2) / 2 * 3600
        assert course.mean_wait_s == pytest.approx(expected_s, rel=0.1)


def test_a_large_job_keeps_the_place_for_itself() -> None:
    """A job that does not fit yet is not passed by others behind it; jobs of two slots are those of half the slots."""
    assert random_jobs(4, 0.7, slots=2).waits_s == random_jobs(4, 0.7).waits_s
    # Two jobs hold both slots for 1 and 3 s; each further one comes a tenth of a second later.
    course = follow([(0.0, 1.0), (0.1, 3.0), (0.1, 1.0), (0.1, 1.0)], slots=2)
    assert list(course.waits_s) == pytest.approx([0.0, 0.0, 0.8, 1.7])


def test_what_is_full_is_full_at_the_told_load(measured: Measured) -> None:
    """At so many times the load as is told, just everything of the resource is taken."""
    scale = quick("cluster")
    found = capacity.forecast(scale, measured)
    for load, factor in zip(found.mean, found.full_at, strict=True):
        grown = capacity_model.loads(scale.times(factor), measured, found.running_busy * factor)
        assert next(one.utilization for one in grown if one.name == load.name) == pytest.approx(1.0)
    assert found.first[1] == min(found.full_at)


def test_more_than_can_be_run_is_told(measured: Measured) -> None:
    """Where more jobs come than end, no wait is made up, and all slots count as taken."""
    found = capacity.forecast(capacity.load_scale("machine", ["jobs_per_day=1000"]), measured)
    assert (found.course, found.running) == (None, 8.0)
    assert "more comes than can be run" in capacity.text(found)
    assert capacity.result(found)["wait_s"] is None


def test_retention_bounds_what_lies_there(measured: Measured) -> None:
    """What retention removes grows until then, and what it keeps goes on."""
    scale = capacity.load_scale("cluster")
    added = capacity_model.growth(scale, measured)
    for days in (100.0, 1000.0):
        lies = capacity_model.stock(scale, measured, days)
        assert lies["artifacts"] == pytest.approx(added["artifacts"] * 90)
        assert lies["job folders"] == pytest.approx(added["job folders"] * 14)
    later, sooner = (capacity_model.stock(scale, measured, days)["database"] for days in (1000.0, 900.0))
    assert later - sooner == pytest.approx(100 * added["rows for good"])
    for_good = scale.model_copy(update={"artifact_days": 0.0})
    assert capacity_model.stock(for_good, measured, 1000.0)["artifacts"] == pytest.approx(1000 * added["artifacts"])


def test_costs_are_those_of_the_given_price(measured: Measured) -> None:
    """Without a price there is no cost; with one it is that of the node hours."""
    assert capacity.result(capacity.forecast(quick("laptop"), measured))["cost_per_day"] is None
    priced = quick("laptop", "price_node_hour=2", "currency=EUR")
    assert capacity.result(capacity.forecast(priced, measured))["cost_per_day"]["all"] == 48.0


def test_what_was_not_measured_is_told(measured: Measured) -> None:
    """A scale beyond a figure's reach is called an extrapolation; one that settings refuse names the setting."""
    scale = capacity.load_scale("thousands", ["servers=3"])
    told = "\n".join(capacity_model.warnings(scale, measured, 1e6))
    assert "extrapolated" in told
    assert f"workers.slots): 3,000 slots need {-(-3000 // MOST_SLOTS)} servers" in told or "3000 slots need" in told
    with pytest.raises(ValueError, match="slots"):
        WorkerSettings(slots=MOST_SLOTS + 1)
    assert WorkerSettings(slots=MOST_SLOTS).slots == MOST_SLOTS


def test_a_key_that_is_wrong_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with status 2 and names the key and what to do."""
    for change, told in {
        "nodez=3": "nodez: a scale has no such key; --keys",
        "nodes": "--set nodes: write KEY=VALUE",
        "jobs_per_day=inf": "jobs_per_day: Input should be a finite number",
        "servers=2": "servers: several servers share a PostgreSQL",
        "job_slots=9": "job_slots: a job",
        "price_node_hour=1": "currency: a price",
    }.items():
        assert capacity.main(["machine", "--set", change]) == 2
        assert capsys.readouterr().err.startswith(f"capacity: {told}"), change


def test_a_scale_that_is_not_there_is_told_what_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no scale is told of those that there are; a file that cannot be read is named."""
    for name in ("machines", str(tmp_path)):
        assert capacity.main([name]) == 2
        assert "cluster, laptop, machine, thousands" in capsys.readouterr().err
    other = tmp_path / "notes.toml"
    other.write_bytes(b"\xff\n")
    assert capacity.main([str(other)]) == 2
    assert f"{other} is no TOML" in capsys.readouterr().err


def test_the_last_line_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    """What the command says in its last line is JSON, and names what is full first."""
    assert capacity.main(["thousands", "--set", "simulated_jobs=500"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["slots"] == 3000
    assert found["first"]["name"] in found["utilization"]


def test_the_page_is_what_the_command_says() -> None:
    """docs/capacity.md repeats the measured figures and the command's answers, all of them in less than a minute."""
    assert set(re.findall(r"^<!-- ([a-z ]+) -->$", PAGE, re.MULTILINE)) == {"figures", "end", *capacity_doc.SCALES}
    began_s = time.process_time()
    assert capacity_doc.render(PAGE) == PAGE, "run `make docs` and commit it"
    assert time.process_time() - began_s < 60


def test_the_page_names_what_there_is() -> None:
    """Metrics, alerts and settings that the page names exist."""
    names = {metric.name for metric in CATALOG}
    named = set(re.findall(r"`(forge_[a-z_]+)`", PAGE))
    assert named
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in named} <= names
    runbooks = {file.stem for file in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert set(re.findall(r"\b(Forge[A-Z][A-Za-z]+)\b", PAGE)) <= runbooks
    settings = CognateSettings().model_dump()
    for key in set(re.findall(r"`((?:workers|limits|retention|artifacts|audit|outbox)\.[a-z_]+)`", PAGE)):
        section, _, name = key.partition(".")
        assert name in settings[section], key


def test_every_figure_says_where_it_comes_from() -> None:
    """A measured figure names a bench that there is, or the log, and a date."""
    for name, figure in tomllib.loads(MEASURED_FILE.read_text(encoding="utf-8")).items():
        found = re.match(r"bench (\w+), 20\d\d-\d\d-\d\d", figure["source"])
        assert found, name
        assert (ROOT / "tests" / "benchmarks" / f"bench_{found[1]}.py").is_file(), name
        assert figure["value"] > 0, name
