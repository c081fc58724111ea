from typing import ClassVar

import pytest
from pydantic import Field

from wrapq.errors import CalibrationError, ProblemsError, WrapqError
from wrapq.registry import Configurable, Options, Place, Registry, build, require


class RipenessOptions(Options):
    days: int = Field(3, ge=0)
    room: str


FRUITS: Registry[type["Fruit"]] = Registry("fruit", "wrapq.quant")


class Fruit(Configurable):
    """A fruit without options."""

    legs: ClassVar[int] = 0


@FRUITS.register("apple")
class Apple(Fruit):
    Options = RipenessOptions
    options: RipenessOptions

    def __init__(self, size: int, options: RipenessOptions) -> None:
        super().__init__(options)
        self.size = size


FRUITS.register("fig")(type("Fig", (Fruit,), {}))
PLACE = Place("basket.first", "fruit", ("weight",), {"basket.first.day": "mine.yaml:3"}.get, "the {}", ("none",))


def mistakes(name: str, **options: object) -> list[str]:
    with pytest.raises(ProblemsError) as caught:
        build(FRUITS, name, options, PLACE)
    return [str(problem) for problem in caught.value.problems]


def test_a_thing_is_made_with_its_options_and_what_else_it_takes():
    apple = build(FRUITS, "Apple", {"room": "cellar"}, PLACE, 7)
    assert (type(apple), apple.options, apple.size) == (Apple, RipenessOptions(room="cellar"), 7)
    assert build(FRUITS, "fig", {}, PLACE).options == Options()


def test_an_unknown_name_is_answered_with_the_nearest_and_what_else_may_stand_there():
    assert mistakes("appel") == ["basket.first.fruit: unknown fruit 'appel'\n    did you mean: apple, none"]


def test_all_that_is_wrong_with_options_is_told_at_once_with_its_place():
    assert mistakes("apple", day=2, days=-1) == [
        "basket.first.days: -1: input should be greater than or equal to 0",
        "basket.first.room: the apple needs room\n    set it with basket.first.room=...",
        "mine.yaml:3: basket.first.day: the apple has no option 'day'\n    did you mean: days",
    ]


def test_a_neighbour_of_the_options_may_have_been_meant():
    assert mistakes("fig", wieght=1) == [
        "basket.first.wieght: the fig has no option 'wieght'\n    did you mean: weight"
    ]


def test_a_package_that_is_not_there_is_named_with_its_extra():
    require("json", "fruit")
    with pytest.raises(
        WrapqError, match=r"^this needs the package 'no_such_package', .*: pip install 'wrapq\[fruit\]'"
    ):
        require("no_such_package", "fruit")
    with pytest.raises(CalibrationError, match=r"^apples needs the package"):
        require("no_such_package", "fruit", "apples", CalibrationError)
