"""The daily choice of configurations, cases and schedules is complete in pairs and always the same."""

import itertools

import catalogue
import pytest
from covering import cover, pairs

AXES = {"a": (1, 2, 3), "b": ("x", "y"), "c": (True, False), "d": (0, 5, 7, 9)}


def test_each_pair_of_values_meets():
    shown = set().union(*map(pairs, cover(AXES)))
    for (a, xs), (b, ys) in itertools.combinations(AXES.items(), 2):
        assert {(a, x, b, y) for x in xs for y in ys} <= shown


def test_it_is_much_smaller_than_everything_and_always_the_same():
    chosen = cover(AXES)
    assert chosen == cover(AXES)
    assert 12 <= len(chosen) <= 18 < len(list(itertools.product(*AXES.values())))


def test_what_is_not_allowed_is_not_chosen_and_not_missed():
    chosen = cover(AXES, lambda choice: choice["a"] != 3 or choice["b"] == "x")
    assert not [c for c in chosen if c["a"] == 3 and c["b"] == "y"]
    shown = set().union(*map(pairs, chosen))
    assert ("a", 3, "d", 9) in shown
    assert ("b", "y", "d", 9) in shown


def test_daily_choice_shows_every_value_of_every_static_axis():
    pytest.importorskip("tilelang")
    import test_emulation

    for family, option in (("forward", "lse"), ("backward", "dlse")):
        chosen = test_emulation.covering(family)
        tiles = {entry.tile for entry in catalogue.entries().values() if entry.family == family}
        assert {(c["tile"], c["dtype"]) for c in chosen} == set(itertools.product(tiles, catalogue.DTYPES))
        assert {(c["tile"], c[option]) for c in chosen} == set(itertools.product(tiles, (False, True)))


def test_nightly_choice_has_each_kernel_with_each_pair_of_lengths_in_each_schedule():
    pytest.importorskip("tilelang")
    import test_emulation

    for family, option in (("forward", "lse"), ("backward", "dlse")):
        shown = {(c["tile"], c["dtype"], c[option], c["S"], c["schedule"]) for c in test_emulation.everything(family)}
        assert len(shown) == len(test_emulation.tiles(family)) * 2 * 2 * len(test_emulation.LENGTHS) * 7
