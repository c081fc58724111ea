"""Several processes decide what one decides."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.calibration import two_processes
from tests.tracking.server import free_port


def read(folder: Path, count: int) -> list[dict]:
    return [json.loads((folder / f"{rank}-of-{count}.json").read_text()) for rank in range(count)]


def forked(folder: Path, count: int) -> list[dict]:
    """With the variables that torchrun sets, and all that is imported already."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    port = free_port()
    processes = [context.Process(target=one_of, args=(folder, rank, count, port)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    return read(folder, count)


def one_of(folder: Path, rank: int, count: int, port: int) -> None:
    os.environ.update(WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    two_processes.main(folder)


def by_torchrun(folder: Path, count: int) -> list[dict]:
    script = Path(two_processes.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    root = Path(__file__).resolve().parents[2]
    command += [str(script), str(folder)]
    done = subprocess.run(command, cwd=root, env=_environment(root), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return read(folder, count)


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", params=[forked, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def walks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, dict]:
    folder = tmp_path_factory.mktemp("walks")
    return (*forked(folder, 1), *request.param(folder, 2))


def test_two_processes_scale_experts_as_one_does(walks: tuple[dict, dict, dict]):
    one, first, second = (walk["transform"] for walk in walks)  # some experts are reached in one process only
    assert first["scaled"] == second["scaled"] and first["unreached"] == second["unreached"] == one["unreached"]
    assert len(one["scaled"]) > 6 and one["scaled"].keys() == first["scaled"].keys()
    for target, figures in one["scaled"].items():
        # of candidates that are about as good the order of summation may decide
        assert first["scaled"][target]["error"] == pytest.approx(figures["error"], rel=0.03), target


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_two_processes_decide_what_one_does(schedule: str, walks: tuple[dict, dict, dict]):
    one, first, second = (walk[schedule] for walk in walks)
    assert first["experts"] == second["experts"] and first["rows"] == second["rows"] == one["rows"]
    assert first["llama"] == second["llama"] and first["mixture"] == second["mixture"]
    assert first["convolutions"] == second["convolutions"] == one["convolutions"]
    assert first["convolved"]["2.weight"]["rows"] == one["convolved"]["2.weight"]["rows"] == 5 * 2 * 34
    assert first["text"] == second["text"] == "said by 0"
    assert set(first["statistics"]) == set(one["statistics"])
    for name, value in one["statistics"].items():
        torch.testing.assert_close(torch.tensor(first["statistics"][name]), torch.tensor(value), rtol=1e-3, atol=1e-4)
    for where, report in one["reports"].items():
        if "rows" not in report:  # rounded to nearest
            continue
        assert first["reports"][where]["rows"] == report["rows"] == 5 * 2 * 12
        assert first["reports"][where]["output_error"] == pytest.approx(report["output_error"], rel=0.05)
    # 8 bits leave next to no room for another order of summation to round differently
    pairs = [(integers, first["llama"][where][1]) for where, (_, integers) in one["llama"].items() if integers]
    same = torch.cat([(torch.tensor(a) == torch.tensor(b)).flatten() for a, b in pairs])
    assert same.float().mean() > 0.99
