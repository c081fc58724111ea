import pytest

from wrapq.errors import PlanError, Problem, RecipeError, and_more, unknown


def test_a_problem_says_where_what_and_what_to_do():
    problem = Problem("override a.b=c", "a.b", "'c' is wrong here", ("d", "e"), "set it")
    lines = ["override a.b=c: a.b: 'c' is wrong here", "    did you mean: d, e", "    set it"]
    assert str(problem) == "\n".join(lines)


@pytest.mark.parametrize(
    ("source", "path", "where"), [("", "", ""), ("mine.yaml:3", "", "mine.yaml:3"), ("", "rules", "rules")]
)
def test_where_leaves_out_what_is_not_known(source, path, where):
    assert Problem(source, path, "no").where == where
    assert str(Problem(source, path, "no")) == (f"{where}: no" if where else "no")


@pytest.mark.parametrize(
    ("error", "count", "head"),
    [
        (RecipeError, 1, "1 mistake in the recipe:"),
        (RecipeError, 2, "2 mistakes in the recipe:"),
        (PlanError, 1, "1 problem in the plan:"),
        (PlanError, 60, "60 problems in the plan:"),
    ],
)
def test_problems_are_counted_in_english_and_not_all_shown(error, count, head):
    lines = str(error([Problem("", "", f"problem in the plans {i}") for i in range(count)])).splitlines()
    assert lines[:2] == [head, "  - problem in the plans 0"]  # the text of a problem is left as it is
    assert len(lines) == 1 + min(count, 51)
    assert (lines[-1] == "  - and 10 more") == (count == 60)


def test_a_name_like_no_other_is_answered_with_all_there_are():
    assert unknown("", "a", "fruit", "xyz", ["apple", "pear"], "say which").remedy.splitlines() == [
        "there is: apple, pear",
        "    say which",
    ]
    assert unknown("", "a", "fruit", "aple", ["kiwi", "apple"]).nearest == ("apple",)


def test_and_more():
    assert [and_more(["a"]), and_more(["a", "b", "c"])] == ["a", "a and 2 more"]
