"""All jobs are composed and resolved before the first is run."""

from __future__ import annotations

import pytest

from wrapq.recipe.axes import parse_axes
from wrapq.sweep.job import Job, SweepError
from wrapq.sweep.planner import Planner


def jobs(*overrides: str) -> list[Job]:
    axes = parse_axes(overrides)
    return Planner(axes, ()).jobs(axes.grid())


def test_a_job_for_every_combination() -> None:
    made = jobs("recipe=w4a16_rtn,w4a16_gptq", "rules.linear.weight.group_size=32,64")
    assert [job.number for job in made] == [1, 2, 3, 4]
    assert made[3].title == "recipe=w4a16_gptq rules.linear.weight.group_size=64"
    assert {job.plan.recipe.name for job in made} == {"w4a16_rtn", "w4a16_gptq"}
    assert "int4:g64:sym:signed" in {point.spec for module in made[3].plan.modules for point in module.points}
    assert len({job.key for job in made}) == 4


def test_jobs_that_do_the_same_have_one_key() -> None:
    first, second = jobs("recipe=w4a16_rtn", "rules.linear.weight.group_size=128", "description=a,b")
    assert first.key == second.key
    assert first.key != jobs("recipe=w4a16_rtn", "runtime.threads=1")[0].key


def test_the_mistakes_of_all_jobs_are_reported_with_the_jobs_that_make_them() -> None:
    with pytest.raises(SweepError) as caught:
        jobs("recipe=w4a16_rtn,w9", "rules.linear.weight.group_size=32,48,64", "seed=1,x")
    said = str(caught.value)
    assert "jobs 2, 4, 6 of 12: override seed=x: seed: 'x' is wrong here" in said
    assert "jobs 7, 8, 9, 10, 11, 12 of 12: override recipe=w9: unknown recipe 'w9'" in said
    assert "jobs 3 of 12" not in said
    assert "job 3 of 12:" in said
    assert "48" in said


def test_a_mistake_of_all_jobs_is_said_once() -> None:
    with pytest.raises(SweepError, match=r"1 problem in the sweep:\n  - all 2 jobs: override rules.linear.weigth=int8"):
        jobs("recipe=w4a16_rtn,w8a16", "rules.linear.weigth=int8")


def test_what_one_recipe_reads_the_others_may_leave() -> None:
    rtn, gptq = jobs("recipe=w4a16_rtn,w4a16_gptq", "calibration.samples=8")
    assert gptq.plan.recipe.calibration.samples == 8
    assert not rtn.plan.needs_calibration
    with pytest.raises(SweepError, match=r"all 2 jobs: override calibration.samples=8: .*nothing reads it"):
        jobs("recipe=w4a16_rtn,w8a16", "calibration.samples=8")


def test_cores_are_shared_out_unless_the_settings_say_how_many() -> None:
    axes = parse_axes(["recipe=w4a16_rtn", "seed=1,2"])
    planner = Planner(axes, ())
    planner.share_cores(2)
    threads = {job.settings.runtime.threads for job in planner.jobs(axes.grid())}
    assert len(threads) == 1
    assert threads != {None}
    axes = parse_axes(["recipe=w4a16_rtn", "runtime.threads=3"])
    planner = Planner(axes, ())
    planner.share_cores(2)
    assert planner.jobs(axes.grid())[0].settings.runtime.threads == 3
