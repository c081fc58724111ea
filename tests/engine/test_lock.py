"""The lock: YAML that any reader can read, with everything that decided the result."""

from __future__ import annotations

import platform

import torch
import yaml

import wrapq
from wrapq.engine.lock import code_digest, device_class, environment, lock_text
from wrapq.recipe.compose import compose


def lock() -> dict:
    recipe = compose(["recipe=int16_activations"]).recipe.model_dump(mode="json")
    return yaml.safe_load(lock_text(recipe, {"model": "abc"}, torch.device("cpu")))


def test_recipe_comes_back_whole() -> None:
    assert lock()["recipe"] == compose(["recipe=int16_activations"]).recipe.model_dump(mode="json")


def test_rules_keep_their_order() -> None:
    assert list(lock()["recipe"]["rules"]) == ["all", "linear", "embedding", "norm"]


def test_code_and_versions_are_in_it() -> None:
    found = lock()
    assert found["digests"] == {"model": "abc", "code": code_digest()}
    assert found["environment"] == environment()
    assert environment()["python"] == platform.python_version()
    assert environment()["wrapq"] == wrapq.__version__
    assert environment()["torch"].startswith(torch.__version__.split("+")[0])


def test_device_class_names_what_bits_depend_on() -> None:
    said = device_class(torch.device("cpu"))
    assert said.startswith(f"cpu {platform.machine()} ")
    assert said.endswith(f"{torch.get_num_threads()} threads")
    assert device_class(torch.device("meta")) == "meta"
