"""No code that comes with a model runs unless the user says so where the model is named; nobody is asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import wrapq
from tests import forked
from tests.engine.record import SMALL, only_run
from tests.models import DEMO
from wrapq.errors import ModelError
from wrapq.runs.checkpoint import read_manifest

UNASKED = "it needs code that comes with it, which is never run unasked: runtime.trust_remote_code=true"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
(Path(__file__).parent / "ran").touch()
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_code(folder: Path, mark: Path) -> Path:
    """Let the model in `folder` ask for code of its own, which leaves `mark` when it runs."""
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    outputs = tmp_path_factory.mktemp("outputs")
    words = ["run", "recipe=w8a16", "evaluation.tokens=1024", "tracking=none", f"paths.outputs={outputs}"]
    done = forked.wrapq(words, outputs)  # in another process: threads of this one would not survive the forks to come
    assert done.returncode == 0, done.stderr
    return only_run(outputs)


@pytest.fixture
def run_with_code(finished: Path, tmp_path: Path) -> Path:
    return with_code(Path(shutil.copytree(finished, tmp_path / "run")), tmp_path / "ran")


def test_a_runs_folder_loads_only_with_leave(run_with_code: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=UNASKED):
        wrapq.load(run_with_code)
    assert not (tmp_path / "ran").exists()
    wrapq.load(run_with_code, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_commands_on_a_finished_run_do_not_ask(command: str, run_with_code: Path, tmp_path: Path) -> None:
    more = "export=compressed_tensors" if command == "export" else "evaluation.tokens=1024"
    done = forked.wrapq([command, str(run_with_code), more], tmp_path)
    assert done.returncode == 4 and UNASKED in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["plan", "run", "evaluate"])
def test_a_checkpoint_is_opened_only_with_leave(command: str, tmp_path: Path) -> None:
    model = with_code(Path(shutil.copytree(DEMO, tmp_path / "model")), tmp_path / "ran")
    words = [command, str(model)] if command == "evaluate" else [command, "recipe=w8a16", f"model.path={model}"]
    words += ["evaluation.tokens=1024", f"paths.outputs={tmp_path / 'out'}"]
    words += ["tracking=none"] if command == "run" else []
    refused = forked.wrapq(words, tmp_path)
    assert refused.returncode == 4 and UNASKED in refused.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    allowed = forked.wrapq([*words, "runtime.trust_remote_code=true"], tmp_path)
    assert allowed.returncode == 0, allowed.stderr
    assert (tmp_path / "ran").exists()
    if command == "run":  # the code lies beside the result, which loads with leave, and verify knows it
        run = only_run(tmp_path / "out")
        with pytest.raises(ModelError, match=UNASKED):
            wrapq.load(run)
        wrapq.load(run, trust_remote_code=True)
        assert "own.py" in read_manifest(run)["files"]


def test_a_file_cannot_allow_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# @package _global_\nruntime: {trust_remote_code: true}\n")
    recipe = forked.wrapq(["plan", f"recipe={tmp_path / 'mine.yaml'}"], tmp_path)
    assert recipe.returncode == 2 and "runtime belongs to the machine, not to a recipe" in recipe.stderr
    (tmp_path / "conf" / "runtime").mkdir(parents=True)
    (tmp_path / "conf" / "runtime" / "mine.yaml").write_text("# Mine.\ntrust_remote_code: true\n")
    preset = forked.wrapq(["plan", "--config-dir", str(tmp_path), "runtime=mine"], tmp_path)
    assert preset.returncode == 2 and "only the command line may allow a model's own code to run" in preset.stderr


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    import numpy

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    numpy.save(tmp_path / "ids.npy", numpy.array([[Bomb()]], dtype=object), allow_pickle=True)
    words = ["calibration=tokens", f"calibration.path={tmp_path / 'ids.npy'}", "tracking=none", *SMALL]
    done = forked.wrapq(["run", "recipe=w8a8_static", *words, f"paths.outputs={tmp_path / 'out'}"], tmp_path)
    assert done.returncode == 2 and "Python objects" in done.stderr and not (tmp_path / "ran").exists()


def test_weights_that_are_a_pickle_run_nothing(tmp_path: Path) -> None:
    import torch

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    model = Path(shutil.copytree(DEMO, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, model / "pytorch_model.bin")
    words = ["recipe=w8a16", f"model.path={model}", "evaluation.tokens=1024", "tracking=none"]
    done = forked.wrapq(["run", *words, f"paths.outputs={tmp_path / 'out'}"], tmp_path)
    assert done.returncode == 4 and "it is a pickle of more than tensors, which is never loaded" in done.stderr
    assert not (tmp_path / "ran").exists()
