"""Dotted names: ends, insides, stars, order, and the nearest of them."""

import random

import pytest

from minilora.names import (
    above,
    described,
    ends,
    ends_with,
    generic,
    lies_within,
    natural,
    nearest,
    outermost_of,
    suffix_counts,
)


@pytest.mark.parametrize(
    ("name", "end", "does"),
    [
        ("a.b.c", "c", True),
        ("a.b.c", "b.c", True),
        ("a.b.c", "a.b.c", True),
        ("a.b.c", "x.a.b.c", False),
        ("a.bc", "c", False),
        ("a.b.c", "", False),
        ("a.b.c", ".c", False),
        ("a.b.c", "b", False),
        ("", "", True),
    ],
)
def test_ends_with_whole_segments(name, end, does):
    assert ends_with(name, end) is does
    assert (end in list(ends(name))) is does


@pytest.mark.parametrize(
    ("name", "outer", "does"),
    [("a.b", "a", True), ("a", "a", True), ("ab", "a", False), ("a", "a.b", False), ("b.a", "a", False)],
)
def test_lies_within(name, outer, does):
    assert lies_within(name, outer) is does
    assert (outermost_of(name, {outer}) == outer) is does


def test_above_and_outermost():
    assert list(above("a")) == []
    assert list(above("a.b.c")) == ["a", "a.b"]
    assert outermost_of("a.b.c", {"a.b", "a"}) == "a"
    assert outermost_of("a.b.c", {"a.b.c"}) == "a.b.c"
    assert outermost_of("a.b.c", {"b", "a.b.c.d"}) is None


def test_generic_has_stars_for_indices_and_nothing_else():
    assert generic("layer.10.attn.2") == "layer.*.attn.*"
    assert generic("layer1.x2.3d") == "layer1.x2.3d"
    assert generic("") == ""


def test_natural_order_is_that_of_a_model():
    names = ["a.2", "a.10", "a.b", "b", "a", "a.2.x", "a.10.x"]
    expected = ["a", "a.b", "a.2", "a.2.x", "a.10", "a.10.x", "b"]
    for _ in range(5):
        random.shuffle(names)
        assert sorted(names, key=natural) == expected
    # Digits of other scripts, signs, and more of them than anything has layers, are not numbers here.
    assert sorted(["²", "1" * 5000, "-1", "3"], key=natural)[-1] == "3"


def test_described_groups_by_index_in_the_order_of_first_sight():
    assert described(["a.0.q", "b", "a.1.q"]) == "'a.*.q' (x2), 'b'"
    assert described(["a.7.q"]) == "'a.7.q'"
    assert described([]) == ""
    assert described([f"layer{i}" for i in range(10)]).endswith("'layer7' and 2 more")


def test_suffix_counts():
    assert suffix_counts(["l.0.q", "l.1.q", "l.0"]) == {"q": 2, "l.0.q": 1, "l.1.q": 1, "l.0": 1}


@pytest.mark.parametrize(
    ("word", "names", "first"),
    [
        ("qery", ["key", "query", "value"], "query"),
        ("query_", ["key", "query"], "query"),
        ("q_proj", ["key", "query"], "query"),
        ("q_proj", ["q_lin", "k_lin"], "q_lin"),
        ("uery", ["query"], "query"),
        ("Wqkv", ["wqkv"], "wqkv"),
        ("attention.q", ["attention.query"], "attention.query"),
        ("xyz", ["query"], None),
        ("", ["query"], None),
    ],
)
def test_nearest(word, names, first):
    found = nearest(word, names)
    assert (found[0] if found else None) == first
    assert len(nearest(word, names * 5)) == len(found)
    assert nearest(word, names, limit=1) == found[:1]
