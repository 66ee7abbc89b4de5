"""The catalogue has every kernel that config offers, and its code is what TileLang gives nvcc."""

import itertools
import json

import catalogue
import pytest
import resources
import torch

from gqa_autograd.kernels import config

SMALL = "postprocess-d64-m128-float16"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOPPER_EMULATOR_CACHE", str(tmp_path))
    return tmp_path


def test_names_are_unique():
    """entries() is a dictionary by name: two kernels of one name would be one of them. Read back as parts, each name is its entry."""
    names = [str(entry) for entry in catalogue.entries().values()]
    assert names == list(catalogue.entries())
    forwards = sum(1 if tile.form == "split" else 2 for tile in config.FORWARD.values())
    merging = 2 * len({D_v for _, D_v in config.D_FORWARD})
    # Before and after the backward, whose parts are merged: packed or not, with a gradient of lse or not
    before = {(tile.D, tile.D_v, tile.block_M, tile.form == "packed") for tile in config.BACKWARD.values()}
    after = {(tile.D, tile.block_M, tile.form == "packed") for tile in config.BACKWARD.values()}
    around = 2 * len(before) + len(after) + len({(tile.D, tile.D_v) for tile in config.BACKWARD.values()})
    decoding = len(config.DECODE) + len(("dense", "paged"))
    assert len(set(names)) == 2 * (forwards + merging + len(config.BACKWARD) + around + decoding)


def test_every_forward_is_in_the_catalogue():
    found = {(entry.tile, entry.dtype, entry.option) for entry in catalogue.entries().values() if entry.family == "forward"}
    wanted = set(itertools.product(config.FORWARD.values(), (torch.bfloat16, torch.float16), (False, True)))
    wanted = {(tile, dtype, lse) for tile, dtype, lse in wanted if lse or tile.form != "split"}
    assert found == wanted


def test_every_backward_is_in_the_catalogue():
    found = {(entry.tile, entry.dtype) for entry in catalogue.entries().values() if entry.family == "backward"}
    assert found == {(tile, dtype) for tile in config.BACKWARD.values() for dtype in (torch.bfloat16, torch.float16)}


def test_every_decode_is_in_the_catalogue():
    found = {(entry.tile, entry.dtype) for entry in catalogue.entries().values() if entry.family == "decode"}
    assert found == {(tile, dtype) for tile in config.DECODE.values() for dtype in (torch.bfloat16, torch.float16)}


def test_every_program_of_the_operators_is_in_the_catalogue():
    """What they build is a name and its arguments: a mask with a tile of its own would need a preprocess of its own in the catalogue."""
    pytest.importorskip("tilelang", reason="no tilelang here: the kernels were not lowered")
    from gqa_autograd.kernels import backward_launch, cache, decode_launch, forward_launch

    wanted = set()
    for dtype in (torch.bfloat16, torch.float16):
        for option in (False, True):
            programs = [forward_launch.program(tile, dtype, option or tile.form == "split") for tile in config.FORWARD.values()]
            programs += [forward_launch.combine_program(D_v, dtype, option) for _, D_v in config.D_FORWARD]
            programs += [program for tile in config.BACKWARD.values() for program in backward_launch.programs(tile, dtype, option)]
            programs.append(cache.program(dtype, option))
            programs += [decode_launch.program(tile, dtype) for tile in config.DECODE.values()]
            wanted |= {(program.name, program.configuration) for program in programs}
    found = [(program.name, program.configuration) for program in (entry.program for entry in catalogue.entries().values())]
    assert set(found) == wanted
    assert len(found) == len(wanted)


def test_code_is_kept_on_disk(cache, monkeypatch):
    """The second process reads the file; another text of the sources makes another file."""
    pytest.importorskip("tilelang", reason="no tilelang here: the kernels were not lowered")
    made = []
    monkeypatch.setattr(catalogue, "lower", lambda *program: made.append(program) or catalogue.Code("device", f"host {len(made)}"))
    entry = catalogue.entries()[SMALL]
    # Past the memory of this process
    code = catalogue.code.__wrapped__
    assert code(entry) == code(entry) == ("device", "host 1")
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == {"device": "device", "host": "host 1"}
    monkeypatch.setattr(catalogue, "SOURCES", "other sources")
    assert code(entry) == ("device", "host 2")
    assert len(list(cache.iterdir())) == 2


def test_the_key_has_the_text_of_the_sources(tmp_path, monkeypatch):
    pytest.importorskip("tilelang", reason="no tilelang here: the kernels were not lowered")
    sources = catalogue._sources
    (tmp_path / "kernel.py").write_text("BLOCK = 64\n")
    real = sources()
    monkeypatch.setattr(catalogue, "KERNELS", tmp_path)
    before = sources()
    assert before == sources() != real
    (tmp_path / "kernel.py").write_text("BLOCK = 128\n")
    assert sources() != before


@pytest.mark.skipif(resources.missing() is not None, reason=f"{resources.missing()}: the kernels were not compiled")
def test_code_is_what_tilelang_compiles(cache, monkeypatch):
    import tilelang

    # Else an older text could come from TileLang's own cache
    monkeypatch.setenv("TILELANG_DISABLE_CACHE", "1")
    assert not tilelang.env.is_cache_enabled()
    entry = catalogue.entries()[SMALL]
    program = entry.program
    compiled = program.factory.compile(*program.configuration)
    code = catalogue.code.__wrapped__(entry)
    assert code.device == compiled.get_kernel_source()
    assert code.host == compiled.get_host_source()
