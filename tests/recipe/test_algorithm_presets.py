import pytest
import yaml

from wrapq.algorithms.base import ALGORITHMS
from wrapq.recipe.presets import list_presets

PRESETS = [preset for preset in list_presets() if preset.kind == "algorithm"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_the_options_that_a_preset_shows_are_the_defaults(preset):
    shown = yaml.safe_load(preset.path.read_text())
    kind = ALGORITHMS.get(shown.pop("algorithm"))
    defaults = kind.Options().model_dump(mode="json")
    assert shown == {name: defaults[name] for name in shown}


def test_there_are_presets_for_all_algorithms():
    assert {preset.name for preset in PRESETS} == set(ALGORITHMS)
