"""What every launcher keeps to: each job once, failures that stay alone, nothing left running."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from wrapq.errors import WrapqError
from wrapq.recipe.axes import parse_axes
from wrapq.recipe.schema import LauncherSettings
from wrapq.sweep.job import FAILED, FINISHED, Job, Outcome, SweepError
from wrapq.sweep.launchers.base import LAUNCHERS, Launcher, make_launcher
from wrapq.sweep.planner import Planner

OPTIONS = {"local": {}, "joblib": {"jobs": 2}, "slurm": {"cluster": "local", "jobs": 2}, "ray": {"jobs": 2}}
SLOW = ("slurm", "ray")  # start interpreters for seconds
WAIT = 300.0


def named(*names: str, slow: tuple[str, ...] = SLOW) -> Callable:
    params = [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]
    return pytest.mark.parametrize("name", params)


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    axes = parse_axes(["recipe=w4a16_rtn", "seed=1,2,3"])
    return Planner(axes, ()).jobs(axes.grid())


def launcher(name: str, folder: Path) -> Launcher:
    made = make_launcher(LauncherSettings(kind=name, **OPTIONS[name]))
    made.folder = folder
    return made


def finish(job: Job) -> Outcome:
    return Outcome(job.key, FINISHED, digest=str(job.plan.recipe.seed), reason=str(os.getpid()))


def die_in_the_second(job: Job) -> Outcome:
    if job.number == 2:
        time.sleep(1)  # while another is under way
        os._exit(9)
    return finish(job)


def wait_in_the_second(job: Job) -> Outcome:
    if job.number == 2:
        Path(os.environ["WRAPQ_TEST_FOLDER"], str(os.getpid())).touch()
        time.sleep(WAIT)
    return finish(job)


def test_every_launcher_is_here() -> None:
    assert set(LAUNCHERS) == set(OPTIONS)


@named("local", "joblib", "slurm", "ray", slow=("joblib", *SLOW))  # the next test is of joblib, too
def test_every_job_is_done_once(name: str, jobs: list[Job], tmp_path: Path) -> None:
    outcomes = list(launcher(name, tmp_path).run(finish, jobs))
    assert sorted((o.key, o.digest) for o in outcomes) == sorted((j.key, str(j.plan.recipe.seed)) for j in jobs)
    own = {outcome.reason for outcome in outcomes} == {str(os.getpid())}
    assert own is (name == "local")


@named("joblib", "slurm", "ray")
def test_a_process_that_dies_fails_its_job_alone(name: str, jobs: list[Job], tmp_path: Path) -> None:
    outcomes = {o.key: o for o in launcher(name, tmp_path).run(die_in_the_second, jobs)}
    assert [outcomes[job.key].status for job in jobs] == [FINISHED, FAILED, FINISHED]
    assert outcomes[jobs[1].key].reason
    assert str(os.getpid()) not in {outcomes[job.key].reason for job in jobs}


@named("joblib", "slurm", "ray")
def test_stopped_early_it_leaves_nothing_running(
    name: str, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRAPQ_TEST_FOLDER", str(tmp_path))
    with closing(launcher(name, tmp_path / "sweep").run(wait_in_the_second, jobs)) as outcomes:
        next(outcomes)
        end = time.monotonic() + 60
        while not (begun := [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]) and time.monotonic() < end:
            time.sleep(0.05)
    assert begun
    end = time.monotonic() + 30
    while _alive(begun[0]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not _alive(begun[0])


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_what_is_not_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, extra in {"joblib": "joblib", "slurm": "slurm", "ray": "ray"}.items():
        with pytest.raises(WrapqError, match=rf"pip install 'wrapq\[{extra}\]'"):
            make_launcher(LauncherSettings(kind=name))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LauncherSettings(kind="jolib"), "launcher.kind: unknown launcher 'jolib'\n    did you mean: joblib"),
        (
            LauncherSettings(kind="joblib", job=3),
            "launcher.job: launcher joblib has no option 'job'\n    did you mean: jobs",
        ),
        (LauncherSettings(kind="joblib", jobs=0), "launcher.jobs: 0: input should be"),
        (LauncherSettings(kind="local", jobs=2), "launcher.jobs: launcher local has no option 'jobs'"),
    ],
)
def test_a_wrong_option_is_named(config: LauncherSettings, said: str) -> None:
    with pytest.raises(SweepError) as caught:
        make_launcher(config)
    assert said in str(caught.value)


def test_options_that_submitit_does_not_take_are_named(jobs: list[Job], tmp_path: Path) -> None:
    made = make_launcher(LauncherSettings(kind="slurm", cluster="local", options={"timout_min": 3}))
    made.folder = tmp_path
    with pytest.raises(WrapqError, match=r"submitit takes no jobs here: .*timout_min"):
        list(made.run(finish, jobs))
