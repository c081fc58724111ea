"""Folding repeated blocks into one line."""

from __future__ import annotations

from wrapq.resolve.folding import fold

Row = tuple[str, str]


def folded(*rows: Row, prefix: str = "model.layers") -> list[tuple[str, int]]:
    return [(name, len(same)) for name, same in fold(rows, prefix, lambda row: row[0], lambda row: row[1])]


def blocks(*indices: int, spec: str = "int8", rest: str = ".mlp") -> list[Row]:
    return [(f"model.layers.{i}{rest}", spec) for i in indices]


def test_equal_rows_of_all_blocks_are_one_line() -> None:
    assert folded(*blocks(0, 1, 2, 3)) == [("model.layers.{0-3}.mlp", 4)]


def test_the_blocks_themselves_are_folded_too() -> None:
    assert folded(*blocks(0, 1, rest="")) == [("model.layers.{0-1}", 2)]


def test_rows_that_differ_stay_apart() -> None:
    rows = (*blocks(0, 1), *blocks(2, spec="int4"), *blocks(3, 4, 6))
    assert folded(*rows) == [("model.layers.{0-1,3-4,6}.mlp", 5), ("model.layers.2.mlp", 1)]


def test_rows_outside_the_blocks_are_never_folded() -> None:
    rows = (("model.embed", "int8"), *blocks(0, 1), ("model.norm", "int8"), ("lm_head", "int8"))
    assert [name for name, _ in folded(*rows)] == ["model.embed", "model.layers.{0-1}.mlp", "model.norm", "lm_head"]


def test_order_is_that_of_the_first_of_each() -> None:
    rows = [*blocks(0, rest=".b"), *blocks(0, rest=".a"), *blocks(1, rest=".b"), *blocks(1, rest=".a")]
    assert [name for name, _ in folded(*rows)] == ["model.layers.{0-1}.b", "model.layers.{0-1}.a"]


def test_without_a_prefix_nothing_is_folded() -> None:
    assert folded(*blocks(0, 1), prefix="") == [("model.layers.0.mlp", 1), ("model.layers.1.mlp", 1)]


def test_a_prefix_is_no_pattern() -> None:
    assert folded(("modelxlayers.0.mlp", "int8"), ("modelxlayers.1.mlp", "int8")) == [
        ("modelxlayers.0.mlp", 1),
        ("modelxlayers.1.mlp", 1),
    ]


def test_the_experts_of_a_block_are_folded_where_all_blocks_have_them_alike() -> None:
    rows = [
        *blocks(0, 1, rest=".mlp.experts.0.up"),
        *blocks(0, 1, rest=".mlp.experts.1.up"),
        *blocks(0, rest=".x.3.up"),
    ]
    assert folded(*rows) == [("model.layers.{0-1}.mlp.experts.{0-1}.up", 4), ("model.layers.0.x.3.up", 1)]
    rows = [*blocks(0, 1, rest=".experts.0"), *blocks(0, rest=".experts.1")]
    assert folded(*rows) == [("model.layers.{0-1}.experts.0", 2), ("model.layers.0.experts.1", 1)]
