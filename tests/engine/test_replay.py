"""A lock is replayed to the bit; what was changed is found, by name and place; elsewhere quality decides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import wrapq
from tests.engine.record import SMALL
from wrapq.cli import main
from wrapq.engine.progress import Progress
from wrapq.engine.replay import Difference, compare_inputs, compare_results, compare_surroundings, verify
from wrapq.errors import ModelError, RecipeError
from wrapq.metrics import Band, metrics
from wrapq.runs.checkpoint import manifest_digest, read_manifest, tensors_digest
from wrapq.runs.folder import LOCK, MANIFEST
from wrapq.runs.lock import Lock, read_lock

OVERRIDES = (*SMALL, "tracking=none", "runtime.kernels=reference", "runtime.cache_gb=0", "runtime.threads=1")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run under an outputs folder of its own."""
    outputs = tmp_path_factory.mktemp("outputs")
    result = wrapq.run("w8a8_static", [*OVERRIDES, f"paths.outputs={outputs}"])
    assert result is not None
    return result.folder


@pytest.fixture
def changed(first: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the lock of the first run with changes, alone in a folder."""

    def write(**changes: object) -> Path:
        path = tmp_path / LOCK
        lock = read_lock(first / LOCK)
        path.write_text(lock.model_copy(update=changes).to_yaml())
        return path

    return write


def replay(path: Path, tmp_path: Path):
    return verify(str(path), [f"paths.outputs={tmp_path / 'outputs'}"], (), Progress())


def test_a_run_is_replayed_to_the_bit_and_leaves_nothing(first: Path, tmp_path: Path) -> None:
    verdict = replay(first / LOCK, tmp_path)
    assert (verdict.exact, verdict.failures, verdict.surroundings) == (True, (), ())
    assert len(verdict.metrics) == 13
    assert all(expected == found for expected, found in verdict.metrics.values())
    assert list((tmp_path / "outputs").iterdir()) == []


def test_what_differs_first_is_named_with_its_tensor(first: Path, tmp_path: Path) -> None:
    """One scale of the kept model is a little larger, and its lock says so: the replay finds that very tensor."""
    folder = tmp_path / "run"
    shutil.copytree(first, folder)
    name = "model.layers.1.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight_scale"][3] *= 1.5
    save_file(tensors, folder / "model.safetensors")
    lock, manifest = read_lock(folder / LOCK), read_manifest(folder)
    modules, manifest["tensors"] = {**lock.modules, name: "0" * 64}, tensors_digest(tensors)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    digests = {**lock.digests, "tensors": manifest["tensors"], "manifest": manifest_digest(folder)}
    (folder / LOCK).write_text(lock.model_copy(update={"modules": modules, "digests": digests}).to_yaml())
    difference, *others = replay(folder / LOCK, tmp_path).failures
    assert (difference.what, difference.found) == ("modules", "1 of them differ")
    assert [other.what for other in others] == ["tensors"]
    where = f"first in {name}.weight_scale: 1 of {tensors[f'{name}.weight_scale'].numel()} values differ"
    assert difference.where.startswith(f"{where}, by up to 3.3e-01")


def test_elsewhere_quality_has_to_lie_within_the_bands(
    changed: Callable[..., Path], first: Path, tmp_path: Path
) -> None:
    lock = read_lock(first / LOCK)
    libraries = lock.environment | {"torch": "1.0"}
    zeros = dict.fromkeys(lock.modules, "0" * 64)  # as if every module had come out otherwise there
    verdict = replay(changed(environment=libraries, modules=zeros), tmp_path)
    assert (verdict.exact, verdict.same) == (False, True)
    assert [(d.what, d.expected) for d in verdict.surroundings] == [("torch", "1.0")]
    better = {stage: dict(values) for stage, values in lock.metrics.items()}
    better["quantized"]["perplexity"] *= 0.97
    verdict = replay(changed(environment=libraries, metrics=better), tmp_path)
    assert [d.what for d in verdict.failures] == ["quantized/perplexity"]
    assert "within 1%" in verdict.failures[0].expected


@pytest.mark.parametrize("digest", ["recipe", "plan", "model"])
def test_another_experiment_is_seen_before_anything_runs(
    digest: str, changed: Callable[..., Path], first: Path
) -> None:
    digests = read_lock(first / LOCK).digests | {digest: "0" * 64}
    verdict = verify(str(changed(digests=digests)), [], (), Progress())
    assert [d.what for d in verdict.failures] == [digest]
    assert verdict.checked.endswith("nothing was run")


def test_a_replay_takes_no_override_of_the_recipe(first: Path) -> None:
    with pytest.raises(RecipeError, match=r"override seed=3: a replay takes only tracking, runtime, paths"):
        verify(str(first), ["seed=3"], (), Progress())


def test_the_model_may_lie_elsewhere(first: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(Path(wrapq.__file__).parent / "assets" / "demo", moved)
    overrides = [f"model.path={moved}", f"paths.outputs={tmp_path / 'outputs'}"]
    assert verify(str(first), overrides, (), Progress()).same
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    assert [d.what for d in verify(str(first), overrides, (), Progress()).failures] == ["model"]


def test_the_recipe_of_a_run_gives_its_digests_again(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["recipe", "from-run", str(first), "-o", "again.yaml"])
    assert (result.exit_code, result.stdout) == (0, "wrote again.yaml\n")
    assert str(first.parent) not in Path("again.yaml").read_text()
    again = wrapq.run("./again.yaml", [o for o in OVERRIDES if not o.startswith(SMALL_KEYS)])
    assert again is not None
    before, after = read_lock(first / LOCK), read_lock(again.folder / LOCK)
    assert before.model_copy(update={"presets": ()}) == after.model_copy(update={"presets": ()})
    assert [origin.package for origin in after.presets if origin.version == ""] == ["again.yaml"]
    refused = CliRunner().invoke(main, ["recipe", "from-run", str(first), "-o", "again.yaml"])
    assert (refused.exit_code, refused.stderr) == (5, "error: again.yaml is there already; nothing was overwritten\n")


SMALL_KEYS = ("evaluation", "calibration")


def compared(lock: Lock, other: Lock) -> list[Difference]:
    results = compare_results(lock, other, Path("nowhere"), Path("nowhere"))
    return [*compare_inputs(lock, other), *compare_surroundings(lock, other), *results]


def test_two_locks_are_compared_in_the_order_of_a_run(first: Path) -> None:
    lock = read_lock(first / LOCK)
    assert not compared(lock, lock)
    other = lock.model_copy(
        update={
            "digests": dict.fromkeys(lock.digests, "x"),
            "device": "cuda H100",
            "modules": dict.fromkeys(lock.modules, "x"),
        }
    )
    names = ["model", "calibration", "evaluation", "device", "code", "modules", "qparams", "tensors", "outputs"]
    assert [d.what for d in compared(lock, other)] == names


def test_a_lock_of_sequences_without_first_tokens_says_so(first: Path) -> None:
    lock = read_lock(first / LOCK)
    digests = lock.digests | {"evaluation": "x"}
    for sequences, where in ((1, "sequences did not begin with the tokenizer's own tokens"), (2, "")):
        before = lock.model_copy(update={"sequences": sequences, "digests": digests})
        assert [(d.what, d.where) for d in compare_inputs(before, lock)] == [("evaluation", where)]
    old = {key: value for key, value in json.loads(lock.model_dump_json()).items() if key != "sequences"}
    assert Lock.model_validate(old).sequences == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "digests: Field required"),
        ("recipe: [", "is no lock of a run"),
        ("a: &a [1]\nb: *a", "anchors and aliases are not allowed"),
        ("recipe: {}\ndigests: {}\nenvironment: {}\ndevice: 3", "is no lock of a run"),
        ("evil: 1", "is no lock of a run"),
    ],
)
def test_what_is_no_lock_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(ModelError, match="is no lock of a run") as caught:
        read_lock(tmp_path / LOCK)
    assert said in str(caught.value) or "Field required" in str(caught.value)


def test_bands() -> None:
    assert Band(0.01).holds(100, 101) and not Band(0.01).holds(100, 101.1)
    assert Band(0.1, 1e-4).holds(0.0, 1e-4) and not Band(absolute=0.01).holds(0.9, 0.9 + 0.011)
    assert not Band(0.01).holds(1.0, float("nan"))
    assert {metric.name for metric in metrics() if metric.band} == {"perplexity", "kl", "top1_agreement"}


def test_exit_status_follows(first: Path, changed: Callable[..., Path], tmp_path: Path) -> None:
    digests = read_lock(first / LOCK).digests | {"model": "0" * 64}
    result = CliRunner().invoke(main, ["verify", str(changed(digests=digests))])
    assert result.exit_code == 1
    assert "differs, first in model (wrapq://demo)" in result.stdout
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "nothing")]).exit_code == 4


def test_a_lock_is_read_as_it_was_written(first: Path) -> None:
    lock = read_lock(first / LOCK)
    assert Lock.model_validate(json.loads(lock.model_dump_json())) == lock
    assert lock.to_yaml() == (first / LOCK).read_text()
    assert len(lock.modules) == 28
    assert {origin.package for origin in lock.presets} == {"wrapq"}
    assert torch.get_num_threads() == 1
