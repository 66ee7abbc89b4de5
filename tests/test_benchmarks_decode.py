"""Benchmarks of decoding: shapes, bytes, contestants, the command. The rows here are those of CPUs, their times made up."""

import dataclasses
import itertools
import json

import pytest
import torch
from benchmark_tools import fake_gpu

from benchmarks import bounds, cases, decode, run
from benchmarks.baselines import NoRow
from gqa_autograd.testing import Case

SMALL = Case(2, 1, 64, 4, 2, 64, causal=True)
GROUPS = [name for name in cases.SETS if name.startswith(run.DECODE)]


def test_sets():
    """The shapes of peers are those that their figures were taken at; caches of the spec's table have its sizes."""
    assert len(cases.SETS["decode-peers"]) == 5
    assert all((case.causal and case.S_q <= 64 <= case.S_kv) or case.S_kv == 16 for name in GROUPS for case in cases.SETS[name])
    size = lambda case: round(2 * case.B * case.S_kv * case.H_kv * case.D * 2 / 1e9, 3)  # noqa: E731
    assert [size(case) for case in cases.SETS["decode-peers"]] == [1.074, 0.537, 0.537, 1.074, 0.134]
    assert [case.S_q for case in cases.SETS["decode-queries"]] == [1, 2, 4, 8, 16, 4, 64]


def test_bytes_and_flops_are_those_of_a_forward():
    case = cases.SETS["decode-peers"][0]
    assert bounds.bytes_read(case, "decode") == bounds.bytes_read(case, "forward") == 2 * 2 * 4 * 65536 * 8 * 128 + 2 * 4 * 96 * 128
    assert bounds.flops(case, "decode") == bounds.flops(case, "forward") == 4 * 4 * 96 * 65536 * 128
    # 4.8 TB/s
    assert bounds.floor_us(case, "decode", flushed=True) == pytest.approx(223.7, abs=0.1)


@pytest.mark.parametrize(
    "arguments", [["decode", "--cases", "peers"], ["forward", "--cases", "decode-peers"], ["forward", "decode", "--cases", "quick"]]
)
def test_sets_belong_to_their_operation(arguments, capsys):
    with pytest.raises(SystemExit):
        run.arguments(arguments)
    assert "are for decode alone" in capsys.readouterr().err


@pytest.mark.parametrize("case", [SMALL, dataclasses.replace(SMALL, S_q=3)], ids=str)
def test_rows(monkeypatch, case):
    """From the contestants to the rows; fa2 has a body for CPUs too. A cache in pages gives the same."""
    fake_gpu(monkeypatch)
    args = run.arguments(["decode", "--cases", "decode-tiny", "--metric", "busy", "cold", "host", "--rounds", "2", "--repeats", "5"])
    who = ("ours", "ours-lse", "ours-page16", "fa2") if case.S_q == 1 else ("ours", "ours-lse", "ours-page16")
    said = []
    found = run.rows(dataclasses.replace(case, H_kv=4), "decode", list(who), args, {"run": "r", "gpu": "NVIDIA H200"}, said.append)
    assert said == []
    assert [(row["contestant"], row["metric"]) for row in found] == list(itertools.product(who, ("busy", "cold", "host")))
    assert found[1]["ms"]["p50"] == 3.2
    assert found[1]["gbps"] == round(bounds.bytes_read(dataclasses.replace(case, H_kv=4), "decode") / 3200 / 1e3, 1)
    assert json.loads(json.dumps(found[0]))["op"] == "decode"
    assert run.summary("decode", case, found)[1].endswith("GB/s")


def test_pages_of_another_cache_are_seen(monkeypatch):
    """What disagrees has no row: here every page is the first one."""
    fake_gpu(monkeypatch)
    monkeypatch.setattr(torch, "arange", lambda P, **options: torch.zeros(P, **options))
    args = run.arguments(["decode", "--cases", "decode-tiny", "--rounds", "2", "--repeats", "5"])
    said = []
    found = run.rows(SMALL, "decode", ["ours", "ours-page16"], args, {"run": "r", "gpu": "NVIDIA H200"}, said.append)
    assert [row["contestant"] for row in found] == ["ours"]
    assert "ours-page16: no row: its decode is" in said[0]


def test_who_cannot_take_part_says_why(monkeypatch):
    fake_gpu(monkeypatch)
    said = []
    made = run.made(dataclasses.replace(SMALL, S_kv=70), "decode", ["ours", "ours-page16", "flex"], said.append)
    assert list(made) == ["ours"]
    assert ["70 keys are no whole pages of 16" in said[0], "no form of it for decoding" in said[1]] == [True, True]


def test_cudnn_of_several_queries_computes_the_full_mask(monkeypatch):
    """torch has no causal mask of the last queries for it; its row says so."""
    seen = []
    monkeypatch.setattr(decode.baselines, "_sdpa", lambda case, *rest: seen.append(case) or decode.Contestant(None, None, None, "9"))
    assert decode.cudnn(SMALL, "decode").instead is None
    several = dataclasses.replace(SMALL, S_q=3)
    assert decode.cudnn(several, "decode").instead == dataclasses.replace(several, causal=False)
    assert not any(case.causal for case in seen)
    with pytest.raises(NoRow):
        decode.absent(SMALL, "decode")
