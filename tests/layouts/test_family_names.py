"""Names taken apart."""

from __future__ import annotations

from loratool.layouts.families import family_of, layer_of, natural, without_common_start


def test_a_number_longer_than_any_count_of_layers_is_no_layer() -> None:
    """Python refuses to read integers of thousands of digits; names can hold them."""
    name = f"model.layers.{'9' * 5000}.q"
    assert layer_of(name) is None
    assert family_of(name) == name
    assert layer_of("h.123456789.q") == 123456789


def test_what_all_begin_with_is_left_out() -> None:
    assert without_common_start(["model.layers.*.a", "model.layers.*.b.c"]) == {
        "model.layers.*.a": "a",
        "model.layers.*.b.c": "b.c",
    }
    assert without_common_start(["x.*.a", "y.*.a"]) == {"x.*.a": "x.*.a", "y.*.a": "y.*.a"}
    assert without_common_start([]) == {}


def test_names_are_sorted_as_people_count() -> None:
    names = ["part_1", "part_2", "part_10", "Part_11", "part_a", "x.1.2", "x.1.10", "x.01.3"]
    backwards = names[::-1]
    assert sorted(backwards, key=natural) == [*names[:5], "x.1.2", "x.01.3", "x.1.10"]
    assert sorted(["9" * 5000, "10", ""], key=natural) == ["", "10", "9" * 5000]
    assert natural("a") != natural("A")
