"""The lock: YAML that any reader can read, with everything that decided the result."""

from __future__ import annotations

import platform

import torch
import yaml

import wrapq
from wrapq.recipe.compose import compose
from wrapq.resolve.resolve import resolve
from wrapq.runs.lock import Lock, code_digest, device_class, environment


def lock() -> dict:
    composed = compose(["recipe=int16_activations"])
    plan = resolve(composed.recipe, composed.sources)
    made = Lock(
        recipe=plan.recipe,
        presets=plan.presets,
        digests={"model": "1234e567"},
        environment=environment(),
        device=device_class(torch.device("cpu")),
    )
    return yaml.safe_load(made.to_yaml())


def test_recipe_comes_back_whole() -> None:
    assert lock()["recipe"] == compose(["recipe=int16_activations"]).recipe.model_dump(mode="json")


def test_rules_keep_their_order() -> None:
    assert list(lock()["recipe"]["rules"]) == ["all", "linear", "embedding", "norm"]


def test_code_and_versions_are_in_it() -> None:
    found = lock()
    assert found["digests"] == {"model": "1234e567"}  # a digest that reads like a number stays a text
    assert found["environment"] == environment()
    assert len(code_digest()) == 64
    assert environment()["python"] == platform.python_version()
    assert environment()["wrapq"] == wrapq.__version__
    assert environment()["torch"].startswith(torch.__version__.split("+")[0])


def test_presets_are_in_it_with_package_version_and_digest() -> None:
    presets = {row["preset"]: row for row in lock()["presets"]}
    assert "recipe/int16_activations" in presets
    assert {(row["package"], row["version"]) for row in presets.values()} == {("wrapq", wrapq.__version__)}
    assert all(len(row["digest"]) == 64 for row in presets.values())


def test_device_class_names_what_bits_depend_on() -> None:
    said = device_class(torch.device("cpu"))
    assert said.startswith(f"cpu {platform.machine()} ")
    assert said.endswith(f"{torch.get_num_threads()} threads")
    assert device_class(torch.device("meta")) == "meta"
