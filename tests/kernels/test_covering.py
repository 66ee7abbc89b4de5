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


def test_axes_apart_show_every_value_and_are_in_no_pair():
    chosen = cover(AXES, alone=("a", "d"))
    for axis, found in AXES.items():
        assert {c[axis] for c in chosen} == set(found)
    assert {(c["b"], c["c"]) for c in chosen} == set(itertools.product(AXES["b"], AXES["c"]))
    # The longest axis decides, or the pairs of the others
    assert len(chosen) <= 5
    assert len(cover(AXES, alone=tuple(AXES))) == 4


def test_what_is_not_allowed_is_not_chosen_and_not_missed():
    chosen = cover(AXES, lambda choice: choice["a"] != 3 or choice["b"] == "x")
    assert not [c for c in chosen if c["a"] == 3 and c["b"] == "y"]
    shown = set().union(*map(pairs, chosen))
    assert ("a", 3, "d", 9) in shown
    assert ("b", "y", "d", 9) in shown


def values(entries, family) -> set:
    return {(axis, value) for entry in entries.values() if entry.family == family for axis, value in catalogue.axes(entry).items()}


@pytest.mark.parametrize("family", ["forward", "combine", "decode", "append", "backward", "preprocess", "postprocess"])
def test_representative_kernels_show_every_value_of_every_static_axis(family):
    few, all_ = catalogue.representative(), catalogue.entries()
    assert values(few, family) == values(all_, family)
    assert few.items() <= all_.items()


def test_daily_choice_runs_each_representative_kernel_with_all_lengths():
    pytest.importorskip("tilelang")
    import test_emulation as emulated

    ran = []
    for test, axes in emulated.AXES.items():
        lengths, few = next(iter(axes)), emulated.kernels(test, catalogue.representative())
        shown = {(c["kernel"], c[lengths]) for c in emulated.covering(test)}
        assert shown == set(itertools.product(few, axes[lengths]))
        ran += few
    assert sorted(map(str, ran)) == sorted(k for k, entry in catalogue.representative().items() if entry.family in ("forward", "backward"))


def test_daily_choice_merges_with_and_without_lse():
    """Each number of parts, too; one kernel merges for all masks, so it has no test of its own."""
    pytest.importorskip("tilelang")
    import test_emulation as emulated

    few = emulated.kernels("split", catalogue.representative())
    chosen = emulated.covering("split")
    assert {(c["kernel"], c["lse"]) for c in chosen} == set(itertools.product(few, (False, True)))
    assert {(c["S"], c["parts"]) for c in chosen} == set(itertools.product(emulated.SPLIT_LENGTHS, (2, 3, 5)))
    # Fewer key blocks than parts
    assert any(c["S"][1] <= c["kernel"].tile.block_N for c in chosen)


def test_packings_have_fewer_as_many_and_more_sequences_than_groups():
    pytest.importorskip("tilelang")
    import test_emulation as emulated

    from gqa_autograd.kernels import forward_tiles

    sizes = {len(q) for q, kv in emulated.PACKINGS.values() if len(q) == len(kv)}
    assert {0, 1, forward_tiles.GROUPS, forward_tiles.GROUPS + 1} <= sizes
    assert max(sizes) > 2 * forward_tiles.GROUPS


def test_nightly_choice_has_each_kernel_with_all_lengths_in_each_schedule():
    pytest.importorskip("tilelang")
    import test_emulation as emulated

    ran = []
    for test, axes in emulated.AXES.items():
        lengths, all_ = next(iter(axes)), emulated.kernels(test, catalogue.entries())
        shown = {(c["kernel"], c[lengths], c["schedule"]) for c in emulated.everything(test)}
        assert len(shown) == len(all_) * len(axes[lengths]) * 7
        ran += all_
    assert len(ran) == sum(entry.family in ("forward", "backward") for entry in catalogue.entries().values())
