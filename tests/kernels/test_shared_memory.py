"""A forward that asks for more shared memory than a block may have compiles, passes every emulator run, and fails at its launch."""

import re

import catalogue
import pytest

from gqa_autograd.kernels import config

# 227 KiB a block; the launch aligns the dynamic part to 1 KiB, behind the barriers
LIMIT = 226 * 1024
DENSE = {"dense", "packed"}


def wanted(tile: config.Forward) -> int:
    """Bytes of the buffers: 16-bit Q, K and V, the output's staging, and what the roles tell each other with room for its alignment."""
    ring = tile.stages * tile.block_N * (tile.D + tile.D_v)
    staging = tile.block_M * tile.D_v if tile.own_staging and tile.form in DENSE else 0
    return 2 * (tile.block_M * tile.D + ring + staging) + (1280 if tile.form == "packed" else 256)


def test_every_forward_fits():
    too_large = {key: wanted(tile) for key, tile in config.FORWARD.items() if wanted(tile) > LIMIT}
    assert not too_large


def pytest_generate_tests(metafunc):
    for fixture, family in (("name", "forward"), ("decode_name", "decode")):
        if fixture in metafunc.fixturenames:
            names = (name for name, entry in catalogue.chosen(metafunc.config).items() if entry.family == family)
            metafunc.parametrize(fixture, names)


def asked(entry: catalogue.Entry) -> int:
    (found,) = (int(n) for n in re.findall(r"v_int64\) = \(\(int64_t\)(\d{5,6})\);", catalogue.code(entry).host))
    return found


def test_the_sum_is_what_the_launch_asks_for(name):
    """Else a new buffer would go uncounted."""
    pytest.importorskip("tilelang", reason="no tilelang here: the kernels were not lowered")
    entry = catalogue.entries()[name]
    assert asked(entry) <= wanted(entry.tile) <= asked(entry) + 1024


def test_as_many_decode_blocks_fit_a_multiprocessor_as_config_says(decode_name):
    """Of 228 KiB each block takes 1 KiB for itself, and its barriers lie before the dynamic part, which is aligned to 1 KiB."""
    pytest.importorskip("tilelang", reason="no tilelang here: the kernels were not lowered")
    entry = catalogue.entries()[decode_name]
    tile = entry.tile
    assert 0 <= asked(entry) - 2 * tile.D * (64 + tile.block_N * (tile.k_stages + tile.v_stages)) <= 64
    assert (asked(entry) + 2048) * tile.blocks_per_sm <= 228 * 1024
    assert f"__launch_bounds__(160, {tile.blocks_per_sm})" in catalogue.code(entry).device
