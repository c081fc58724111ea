"""Plans of recipes that are written in the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import indent

import pytest

from wrapq.errors import WrapqError
from wrapq.recipe.compose import compose
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve

MakePlan = Callable[..., Plan]
BOTH = "round: {algorithm: rtn}\nranges: {algorithm: ranges}\n"


@pytest.fixture
def make_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """The plan of a recipe with the given rules and stack (YAML) on the shipped model of four blocks."""
    monkeypatch.chdir(tmp_path)

    def make(rules: str, stack: str = "round: {algorithm: rtn}\n", *overrides: str, more: str = "") -> Plan:
        text = "# @package _global_\nname: mine\n" + more
        text += f"rules:\n{indent(rules, '  ')}\nstack:\n{indent(stack, '  ')}\n"
        (tmp_path / "mine.yaml").write_text(text)
        composed = compose(["recipe=./mine.yaml", *overrides])
        return resolve(composed.recipe, composed.sources)

    return make


@pytest.fixture
def refusal(make_plan: MakePlan) -> Callable[..., str]:
    """The message with which such a recipe is refused."""

    def message(*args: str, **kwargs: str) -> str:
        with pytest.raises(WrapqError) as caught:
            make_plan(*args, **kwargs)
        return str(caught.value)

    return message


def spec_of(plan: Plan, point: str) -> str | None:
    """The short form of the spec of `point`, the module's name and the point's."""
    return {f"{m.name}.{p.name}": p.spec for m in plan.modules for p in m.points}.get(point)
