"""The benchmarks of the backward: rows of packs, gates, tables."""

import pytest
import torch
from benchmark_tools import SMALL_PACK, fake_gpu, write

import gqa_autograd
from benchmarks import baselines, packed, run, table
from gqa_autograd import ops, ops_varlen, testing, testing_varlen
from gqa_autograd.testing import Case


@pytest.fixture
def without_gpu(monkeypatch):
    fake_gpu(monkeypatch)


def test_backward_rows_of_a_pack(without_gpu):
    """Five products for each visible pair; only what was asked for the same bits from run to run promises them. Faults: the forward timed
    in the backward's place; the forward's FLOPs; deterministic the same in every row."""
    args, said = run.arguments(["backward", "--rounds", "2", "--repeats", "5"]), []
    names = ["ours", "ours-lse", "ours-det", "ours-dense", "fa2", "flashinfer"]
    with torch.random.fork_rng():
        made = run.made(SMALL_PACK, "backward", ["ours"], said.append)["ours"]
    with testing.recorded() as bodies:
        assert [t.shape for t in made.backward()] == [(128, 4, 64), (128, 2, 64), (128, 2, 64)]
    assert bodies == ["attention_varlen_bwd"]
    whole = lambda q, k, v: gqa_autograd.attention_varlen(q, k, v, *[testing_varlen.offsets(SMALL_PACK.lengths)] * 2, causal=True)  # noqa: E731
    fa2 = lambda pack, op, *t: baselines.contestant(whole, "0", op, t)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packed.CONTESTANTS, "fa2", fa2)
        ours, fixed, dense, peer = run.rows(SMALL_PACK, "backward", names, args, {"run": "r"}, said.append)
    assert [line.split(":")[0] for line in said] == ["ours-lse", "flashinfer"]
    assert [row["contestant"] for row in (ours, fixed, dense, peer)] == ["ours", "ours-det", "ours-dense", "fa2"]
    assert ours["flops"] == fixed["flops"] == peer["flops"] == 10 * 64 * 4 * (50 * 51 + 1 * 2 + 77 * 78) // 2
    assert dense["flops"] == 10 * 64 * 4 * 2 * 64 * 65 // 2
    assert [row["deterministic"] for row in (ours, fixed, dense, peer)] == [False, True, False, False]
    assert ours["error_ratio"] <= 2


@pytest.mark.parametrize("case", [Case(1, 20, 20, 4, 2, 64, causal=True), SMALL_PACK], ids=["dense", "pack"])
def test_deterministic_reaches_the_operator(case, without_gpu, monkeypatch):
    """Faults: the switch lost on the way, in the operator itself or in the gradient that host time takes."""
    module, name = (ops, "attention_bwd") if isinstance(case, Case) else (ops_varlen, "attention_varlen_bwd")
    right, asked, said = getattr(module, name), [], []
    monkeypatch.setattr(module, name, lambda *given: asked.append(given[-1]) or right(*given))
    with torch.random.fork_rng():
        made = run.made(case, "backward", ["ours", "ours-det"], said.append)
    for who, wanted in (("ours", False), ("ours-det", True)):
        asked.clear()
        made[who].backward()
        made[who].gradient()
        assert asked == [wanted, wanted]
        assert made[who].deterministic is wanted
    with torch.random.fork_rng():
        made = run.made(case, "forward", ["ours", "ours-det"], said.append)
    assert list(made) == ["ours"]
    assert made["ours"].deterministic
    assert said[0].startswith("ours-det: no row for forward")


def test_a_wrong_gradient_of_a_pack_has_no_row(without_gpu, monkeypatch):
    """Faults: gradients of packs not looked at by the gate; one of them left out of the agreement."""
    args, said = run.arguments(["backward"]), []
    right = ops_varlen.attention_varlen_bwd
    halved = lambda *tensors: (*right(*tensors)[:2], right(*tensors)[2] * 0.9)  # noqa: E731
    made = run.made(SMALL_PACK, "backward", ["ours"], said.append)["ours"]
    wrong = made._replace(backward=lambda: (*made.backward()[:2], made.backward()[2] * 0.9))
    assert list(run.agreeing({"ours": made, "other": wrong}, "backward", said.append)) == ["ours"]
    monkeypatch.setattr(ops_varlen, "attention_varlen_bwd", halved)
    with pytest.raises(AssertionError, match="dv: m"):
        run.rows(SMALL_PACK, "backward", ["ours"], args, {}, lambda line: None)


def test_tables_of_the_backward(tmp_path):
    """Faults: the forward's rows; best figures shifted by a shape; a run that lacks a shape."""
    for make in (table.peers_backward, table.varlen_backward, table.small_backward):
        assert make(tmp_path) == ""
    groups = [("v", "busy", "varlen", ("ours", "ours-dense")), ("s", "busy", "small-training", ("ours", "cudnn"))]
    write(tmp_path, "forward", [("f", "busy", "peers", ("ours", "cudnn")), *groups])
    assert table.peers_backward(tmp_path) == table.varlen_backward(tmp_path) == table.small_backward(tmp_path) == ""
    write(tmp_path, "backward", [("p", "busy", "peers", ("ours", "cudnn")), *groups])
    write(tmp_path, "backward", [("q", "busy", "quick", ("ours", "cudnn"))])
    lines = table.peers_backward(tmp_path).splitlines()
    assert "bf16, backward, busy, commit p" in lines[0]
    assert lines[0].endswith("| ours | cuDNN | best peer, another run |")
    assert len(lines) == 15
    assert lines[2] == "| 8, 2048, 2048, 16/16, 128, causal | 100 | 100 | 458 FA4 |"
    assert lines[6].endswith("| 2, 4096, 4096, 32/8, 128, causal | 100 | 100 | 506 FA3 |")
    assert lines[14] == "| 1, 8192, 8192, 16/4, 256, causal | 100 | 100 | 378 cuDNN |"
    assert "best peer" not in table.peers(tmp_path)
    assert table.deterministic(tmp_path) == ""
    assert "backward, packed" in table.varlen_backward(tmp_path)
    assert "backward" not in table.varlen(tmp_path)
    small = table.small_backward(tmp_path).splitlines()
    assert small[2] == "| 8/1 heads, causal |" + " 100.0 / 101.0 |" * 4
    assert len(small) == 6
    write(tmp_path, "backward", [("d", "busy", "peers", ("ours", "ours-det", "cudnn"))])
    assert table.deterministic(tmp_path).startswith("With deterministic=True the 13 shapes take 1.010 to 1.010 times as long as without")
    assert table.peers_backward(tmp_path).splitlines()[0].endswith("| ours | ours, deterministic | cuDNN | best peer, another run |")
