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


def values(entries, family) -> set:
    return {(axis, value) for entry in entries.values() if entry.family == family for axis, value in catalogue.axes(entry).items()}


@pytest.mark.parametrize("family", ["forward", "backward", "preprocess", "postprocess"])
def test_representative_kernels_show_every_value_of_every_static_axis(family):
    few, all_ = catalogue.representative(), catalogue.entries()
    assert values(few, family) == values(all_, family)
    assert few.items() <= all_.items()


def test_daily_choice_runs_each_representative_kernel_with_each_pair_of_lengths():
    pytest.importorskip("tilelang")
    import test_emulation as emulated

    for family in ("forward", "backward"):
        few = emulated.kernels(family, catalogue.representative())
        shown = {(c["kernel"], c["S"]) for c in emulated.covering(family)}
        assert shown == set(itertools.product(few, emulated.LENGTHS))


def test_nightly_choice_has_each_kernel_with_each_pair_of_lengths_in_each_schedule():
    pytest.importorskip("tilelang")
    import test_emulation as emulated

    for family in ("forward", "backward"):
        shown = {(c["kernel"], c["S"], c["schedule"]) for c in emulated.everything(family)}
        assert len(shown) == len(emulated.kernels(family, catalogue.entries())) * len(emulated.LENGTHS) * 7
