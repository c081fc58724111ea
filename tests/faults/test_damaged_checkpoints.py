"""What is damaged of a run that was put aside costs blocks, and never the run nor its bits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.calibration.conftest import as_batches, decided, gptq_walker
from tests.conftest import VOCABULARY, build_model
from tests.faults.runs import RECIPE, arguments, digests, finish, got_past, start, wait
from tests.tracking.server import free_port
from wrapq import PTQConfig, prepare
from wrapq.calibration.processes import Processes
from wrapq.runs.folder import RunFolder
from wrapq.runs.resume import ChangedError, ResumeStore
from wrapq.sweep.job import Outcome
from wrapq.sweep.run_job import Workplace

BLOCKS, LAST = 4, 3
CONFIG = PTQConfig(weight="int4:g16:sym", activations="uint8:tensor:asym", overrides={"model.embed_tokens": None})


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nothing(path: Path) -> None:
    path.unlink()


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def another_text(path: Path) -> None:
    path.write_text(json.dumps({"state": "{}", "digest": "0", "status": ["FINISHED"]}))


def a_list(path: Path) -> None:
    path.write_text("[1]")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("")


KINDS = (cut, flip, empty, nothing, zeros, another_text, a_list, a_folder)


class _StoppedError(Exception):
    pass


def walk(folder: Path, stop: int | None = None, data: str = "mine") -> tuple[dict[str, str], list[str], int]:
    """A walk in `folder`, which ends before block `stop` is run; what it decided, was told, and where it began."""
    told: list[str] = []
    model = prepare(build_model("llama", num_hidden_layers=BLOCKS), CONFIG)
    store = ResumeStore(RunFolder(folder), {"model": "m", "data": data}, torch.device("cpu"), told.append, Processes())
    (folder / "resume").mkdir(parents=True, exist_ok=True)
    walker = gptq_walker(model, checkpoints=store)
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(3, VOCABULARY, (2, length), generator=generator) for length in (12, 9, 16)]

    def advance() -> None:
        done.append(1)
        if stop is not None and len(done) == stop:
            raise _StoppedError

    done: list[int] = []
    with suppress(_StoppedError):
        walker.run(as_batches(tokens), "sequential", advance)
    return decided(model) if stop is None else {}, told, walker.checkpoint.index if walker.checkpoint else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a walk decides that nothing happened to."""
    return walk(tmp_path_factory.mktemp("whole"))[0]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a walk that was put aside before its last block."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    walk(folder, LAST)
    return folder


@pytest.mark.parametrize("damage", KINDS)
@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("state.json", LAST - 1),
        (f"hidden-{LAST}/1.safetensors", LAST - 1),
        pytest.param(f"points-{LAST}.safetensors", LAST - 1, marks=pytest.mark.slow),
        ("points-1.safetensors", 0),
    ],
)
def test_a_walk_goes_on_from_the_last_block_that_is_whole(
    name: str, begins: int, damage: Callable[[Path], None], stopped: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    damage(folder / "resume" / name)
    found, told, began = walk(folder)
    assert (found, began) == (whole, begins)
    end = "the run goes on from the block before" if begins else "the run begins anew"
    assert set(told) == {f"{folder / 'resume' / name} is damaged: {end}"}
    assert walk(folder)[0] == whole  # what it wrote in turn is whole


def test_what_is_whole_is_taken_up_in_silence(stopped: Path, whole: dict[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    assert walk(folder) == (whole, [], LAST)
    folder = Path(shutil.copytree(stopped, tmp_path / "again"))
    walk(folder, 1)  # the last block is left
    assert walk(folder) == (whole, [], LAST)


@pytest.mark.parametrize("damage", KINDS)
def test_without_a_state_it_begins_anew(
    damage: Callable[[Path], None], stopped: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    for name in ("state.json", "state-before.json"):
        damage(folder / "resume" / name)
    found, told, began = walk(folder)
    assert (found, began) == (whole, 0)
    assert len(told) == 2 - 2 * (damage is nothing) and all(line.endswith("begins anew") for line in told)


@pytest.mark.parametrize("stop", [1, 2])
def test_it_can_be_put_aside_again_after_damage(
    stop: int, stopped: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    """Nothing that was damaged, or written after it, is mixed with what is written now."""
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    flip(folder / "resume" / f"hidden-{LAST}" / "0.safetensors")
    assert walk(folder, stop)[2] == LAST - 1
    flip(folder / "resume" / "state.json")
    found, told, began = walk(folder)
    assert found == whole and began == LAST - 1 and len(told) == 1


@pytest.mark.parametrize("name", [f"hidden-{LAST}", f"hidden-{LAST}/0.safetensors", "points-2.safetensors"])
def test_a_file_of_another_run_or_place_is_no_checkpoint(
    name: str, stopped: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    walk(tmp_path / "other", LAST, data="other")
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    others = [tmp_path / "other" / "resume" / name]
    if name == f"hidden-{LAST}":
        others = [folder / "resume" / f"hidden-{LAST - 1}"]
    elif name.startswith("points"):
        others += [folder / "resume" / "points-1.safetensors"]
    for other in others:
        copied = Path(shutil.copytree(folder, tmp_path / f"of-{other.parent.parent.name}"))
        shutil.rmtree(target) if (target := copied / "resume" / name).is_dir() else target.unlink()
        (shutil.copytree if other.is_dir() else shutil.copy)(other, target)
        found, told, began = walk(copied)
        assert found == whole and began < LAST and "is damaged" in told[0]


def test_a_state_of_another_run_is_not_taken(stopped: Path, whole: dict[str, str], tmp_path: Path) -> None:
    walk(tmp_path / "other", LAST, data="other")
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    with pytest.raises(ChangedError, match="changed since it stopped: data"):
        walk(folder, data="other")
    shutil.copy(tmp_path / "other" / "resume" / "state.json", folder / "resume")
    line = f"{folder / 'resume' / 'state.json'} is of another run: the run goes on from the block before"
    assert walk(folder) == (whole, [line], LAST - 1)


@pytest.mark.parametrize("damage", KINDS)
def test_a_job_whose_outcome_is_damaged_is_done_again(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place, outcome = Workplace(tmp_path, tmp_path, None, {}), Outcome("a" * 64, "finished", figures={"kl": 0.25})
    place.write(outcome)
    assert place.outcome(outcome.key) == outcome and place.outcome("b" * 64) is None and not caplog.text
    (path,) = tmp_path.glob("jobs/*.json")
    damage(path)
    assert place.outcome(outcome.key) is None
    assert (f"{path} is damaged: the job is done again" in caplog.text) == (damage is not nothing)
    assert place.write(outcome) == place.outcome(outcome.key)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a run that was killed after its second block."""
    outputs = tmp_path_factory.mktemp("killed") / "out"
    process = start(outputs)
    wait(got_past(outputs, 2))
    process.kill()
    process.join()
    return outputs


@pytest.mark.parametrize(
    ("name", "damage", "load"),
    [
        ("run.json", cut, "whole"),
        pytest.param("run.json", a_folder, "whole", marks=pytest.mark.slow),
        pytest.param("run.json", nothing, "whole", marks=pytest.mark.slow),
        pytest.param("run.json", a_list, "whole", marks=pytest.mark.slow),
        ("resume/hidden-*/1.safetensors", flip, "streaming"),
        pytest.param("resume/state.json", zeros, "whole", marks=pytest.mark.slow),
        pytest.param("resume/points-1.safetensors", cut, "streaming", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_resumed_all_the_same(
    name: str, damage: Callable[[Path], None], load: str, killed: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    outputs = Path(shutil.copytree(killed, tmp_path / "out"))
    damaged = sorted(outputs.glob(f"{RECIPE}/*/{name}"))[-1]
    damage(damaged)
    done = finish(outputs, "--resume", f"runtime.load={load}")
    assert done.returncode == 0, done.stderr
    assert digests(outputs) == [undisturbed]
    assert "".join(done.stdout.split()).count(f"note:{damaged} is damaged: ".replace(" ", "")) == 1, done.stdout
    assert json.loads((damaged.parents[len(Path(name).parts) - 1] / "run.json").read_text())["status"] == "FINISHED"


def start_two(outputs: Path, *more: str) -> list[BaseProcess]:
    """A run as `torchrun` starts it, in two processes."""
    port, processes = free_port(), []
    for rank in range(2):
        names = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
        program = f"import os; os.environ.update({names | {'MASTER_ADDR': '127.0.0.1'}}); "
        program += f"from wrapq.cli import main; main({arguments(outputs, *more)})"
        files = [outputs.with_name(f"{outputs.name}-{rank}-{name}") for name in ("said", "errors")]
        processes.append(forked.start(["-c", program], outputs.parent, files))
    return processes


@pytest.mark.slow
@pytest.mark.parametrize("damage", [None, flip, nothing])
def test_two_processes_take_a_run_up_at_the_same_block(damage: Callable[[Path], None] | None, tmp_path: Path) -> None:
    whole, outputs = tmp_path / "whole", tmp_path / "out"
    for process in start_two(whole):
        process.join(forked.TIMEOUT)
    processes = start_two(outputs)
    wait(got_past(outputs, 2))
    for process in processes:
        process.kill()
        process.join()
    damaged = max(outputs.glob("*/*/resume/hidden-*/1.safetensors"))
    if damage is not None:
        damage(damaged)
    (tmp_path / "out-0-said").unlink()
    for process in start_two(outputs, "--resume"):
        process.join(forked.TIMEOUT)
        assert process.exitcode == 0, (tmp_path / "out-0-errors").read_text()
    said = "".join((tmp_path / "out-0-said").read_text().split())
    assert "resumedbeforeblock" in said
    assert said.count("isdamaged:therungoesonfromtheblockbefore") == (damage is not None)
    assert digests(outputs) == digests(whole) != []


def test_what_another_run_left_damaged_stands_in_nobodys_way(
    killed: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    outputs = Path(shutil.copytree(killed, tmp_path / "out"))
    for index, damage in enumerate(KINDS):
        for folder in (outputs / RECIPE / f"2999-01-01_00-00-0{index}", outputs / "other" / f"{index}"):
            folder.mkdir(parents=True)
            (folder / "run.json").write_text('{"status": "RUNNING"}')
            damage(folder / "run.json")
    done = finish(outputs, "--resume")
    assert done.returncode == 0, done.stderr
    assert digests(outputs) == [undisturbed]
