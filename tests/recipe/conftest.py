from collections.abc import Callable
from pathlib import Path

import pytest

from wrapq.errors import RecipeError
from wrapq.recipe.compose import compose


@pytest.fixture
def write_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], str]:
    """Writes `mine.yaml` into an empty working directory and returns the override that chooses it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"recipe=./{name}"

    return write


@pytest.fixture
def refusal() -> Callable[..., str]:
    """The message with which a list of overrides is refused."""

    def message(*overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            compose(list(overrides))
        return str(caught.value)

    return message
