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
    if "name" in metafunc.fixturenames:
        names = (name for name, entry in catalogue.chosen(metafunc.config).items() if entry.family == "forward")
        metafunc.parametrize("name", names)


def test_the_sum_is_what_the_launch_asks_for(name):
    """Else a new buffer would go uncounted."""
    pytest.importorskip("tilelang", reason="no tilelang here: the kernels were not lowered")
    entry = catalogue.entries()[name]
    (asked,) = (int(n) for n in re.findall(r"v_int64\) = \(\(int64_t\)(\d{5,6})\);", catalogue.code(entry).host))
    assert asked <= wanted(entry.tile) <= asked + 1024
