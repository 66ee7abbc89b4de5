"""The benchmark harness on a CPU: what is made of the trials; bounds, orders, contestants, rows, table, plot and help."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_tools import SMALL_PACK, fake_gpu, write

import gqa_autograd
from benchmarks import baselines, bounds, cases, measure, packed, plot, profiled, progress, rows, run, table, trace
from benchmarks.trace import Inconsistent, NoDeviceActivity
from gqa_autograd import testing
from gqa_autograd.testing import Case


def test_a_trial_is_repeated_twice_and_then_an_error(monkeypatch):
    """Faults: no repetition; a fourth; a want of CUPTI repeated."""
    results, good = [], [trace.Repetition(1, 1, 1)]

    def trial(*_):
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(profiled, "trial", trial)
    results[:] = [Inconsistent("1"), Inconsistent("2"), good]
    assert profiled.checked_trial(None, None, 0, 1) == good
    results[:] = [Inconsistent("1"), Inconsistent("2"), Inconsistent("3"), good]
    with pytest.raises(Inconsistent, match="3"):
        profiled.checked_trial(None, None, 0, 1)
    results[:] = [NoDeviceActivity("none"), good]
    with pytest.raises(NoDeviceActivity):
        profiled.checked_trial(None, None, 0, 1)


# --- bounds, orders, statistics ---
def test_orders_put_everyone_everywhere():
    taken = list(itertools.islice(measure.orders("ABC"), 6))
    assert taken[:2] == [("A", "B", "C"), ("C", "B", "A")]
    assert set(taken) == set(itertools.permutations("ABC"))
    assert list(itertools.islice(measure.orders("AB"), 2)) == [("A", "B"), ("B", "A")]


def test_flops():
    """2 (D + D_v) a visible pair forward; backward 2.5 times that for D = D_v, else 2 (3 D + 2 D_v)."""
    case = Case(2, 64, 64, 4, 2, 128)
    assert bounds.flops(case, "forward") == 4 * 128 * 64 * 64 * 2 * 4
    assert bounds.flops(case, "backward") == 2.5 * bounds.flops(case, "forward")
    mla = Case(1, 10, 10, 1, 1, 192, causal=True, D_v=128)
    assert bounds.flops(mla, "forward") == 2 * (192 + 128) * 55
    assert bounds.flops(mla, "backward") == 2 * (3 * 192 + 2 * 128) * 55


def test_bytes_read_leaves_out_what_nobody_sees():
    decode = Case(1, 1, 1000, 8, 2, 128, causal=True)
    assert bounds.bytes_read(decode, "forward") == 2 * (8 * 128 + 1000 * 2 * 2 * 128)
    windowed = Case(1, 1, 1000, 8, 2, 128, causal=True, window=(99, -1))
    assert bounds.bytes_read(windowed, "forward") == 2 * (8 * 128 + 100 * 2 * 2 * 128)


def test_a_time_below_the_floor_is_an_error():
    case = Case(1, 8192, 8192, 32, 8, 128, causal=True)
    floor = bounds.floor_us(case, "forward", flushed=True)
    assert floor == pytest.approx(bounds.flops(case, "forward") / 990e6)
    measure.check_floor("ours", [[floor * 1.1], [floor * 1.2]], floor)
    with pytest.raises(measure.Implausible, match="at least"):
        measure.check_floor("ours", [[floor * 1.1], [floor * 1.2, floor * 0.99]], floor)


def test_a_graph_that_disagrees_is_an_error():
    samples = measure.Samples(busy=[[200.0, 201.0, 202.0]])
    measure.check_graph("ours", samples, [205.0])
    assert samples.graph_over_busy == pytest.approx(205 / 201)
    with pytest.raises(measure.Implausible, match="CUDA graph"):
        measure.check_graph("ours", samples, [100.0])
    measure.check_graph("ours", measure.Samples(busy=[[5.0]]), [8.0])


def test_figures():
    case = Case(1, 1024, 1024, 8, 2, 128, causal=True)
    row = rows.figures(case, "forward", "busy", [[10.0, 11.0, 12.0], [12.0, 13.0, 14.0]])
    assert row["ms"] == {"p10": 0.01, "p50": 0.012, "p90": 0.013}
    assert (row["samples"], row["trials"], row["spread"]) == (6, 2, round(2 / 12, 4))
    assert row["tflops"] == pytest.approx(bounds.flops(case, "forward") / 12e-6 / 1e12, rel=1e-3)
    assert "tflops" not in rows.figures(case, "forward", "host", [[10.0]])


# --- cases, contestants, the command ---
def test_sets():
    assert len(cases.SETS["peers"]) == 13
    assert all(len(set(group)) == len(group) for group in cases.SETS.values())
    assert [case.S_q for case in cases.SETS["lengths"]] == list(cases.PLOTTED)
    assert all(case.B * case.S_q == 16384 for case in cases.SETS["lengths"][:-1])
    assert Case(1, 256, 8192, 8, 1, 128, causal=True) in cases.SETS["small-grids"]
    for case in cases.SETS["small-grids"]:
        full = dataclasses.replace(case, causal=False)
        if case.causal and case.S_q != case.S_kv:
            assert full in cases.SETS["small-grids"]
            assert bounds.flops(full, "forward") <= 1.04 * bounds.flops(case, "forward")


def test_all_rows_names_sets_and_contestants_that_exist(tmp_path):
    """Every command of the script is parsed by the one that it calls. Fault: a set that is called otherwise."""
    (tmp_path / "python").write_text('#!/bin/sh\nshift 2\necho "$@" >> "$CALLS"\n')
    (tmp_path / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "RESULTS": "elsewhere"}
    script = Path(run.__file__).with_name("all_rows.sh")
    subprocess.run(["bash", str(script)], env=env, check=True, capture_output=True)
    parsed = [run.arguments(line.split()) for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(parsed) == 18
    assert [p.ops for p in parsed] == [["forward"]] * 8 + [["backward"]] * 7 + [["decode"]] * 3
    assert {"peers", "varlen", "small-grids", "lengths", "window", "softcap", "head-sizes", "tiny"} == {
        s for p in parsed[:8] for s in p.cases
    }
    assert {"peers", "varlen", "small-training", "lengths", "head-sizes", "masked-training"} == {s for p in parsed[8:15] for s in p.cases}
    assert {"decode-peers", "decode-models", "decode-queries", "decode-tiny"} == {s for p in parsed[15:] for s in p.cases}
    assert {str(p.results) for p in parsed} == {"elsewhere"}


def test_absent_peers_are_named(monkeypatch):
    monkeypatch.setattr(baselines, "missing", lambda name: "flash_attn.cute" if name == "fa4" else None)
    said = []
    assert run.present(["cudnn", "fa4"], said.append) == ["ours", "cudnn"]
    assert said == ["fa4: not installed (no module flash_attn.cute), no rows"]


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 50, 70, 4, 2, 16, causal=True, window=(13, -1), softcap=20.0, dtype=torch.float32),
        Case(1, 64, 64, 4, 2, 16, window=(7, 5), scale=0.3, dtype=torch.float32),
        Case(2, 30, 20, 2, 2, 16, dtype=torch.float32, D_v=32),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flex_computes_the_case(monkeypatch, case):
    """Mask and score function, not compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    tensors = testing.make(case)
    out = baselines.flex(case, "forward", *tensors).forward().transpose(1, 2)
    torch.testing.assert_close(out.double(), testing.exact(case, *tensors).out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cudnn", "fa2"])
def test_what_a_peer_cannot_do_is_no_row(name):
    said = []
    windowed = Case(1, 64, 64, 2, 1, 64, causal=True, window=(7, -1), softcap=2.0)
    with pytest.raises(baselines.NoRow, match="no window"):
        baselines.CONTESTANTS[name](windowed, "forward", *[torch.empty(0)] * 4)
    with pytest.raises(baselines.NoRow, match="top-left"):
        baselines.cudnn(Case(1, 8, 64, 2, 1, 64, causal=True), "forward", *[torch.empty(0)] * 4)
    assert said == []


def test_a_contestant_that_computes_something_else_has_no_row():
    case, said = Case(1, 33, 33, 4, 2, 16, causal=True, dtype=torch.float32), []
    q, k, v, do = (torch.randn(1, 33, H, 16) for H in (4, 2, 2, 4))
    right = baselines.ours(case, "backward", q, k, v, do)
    full = baselines.ours(Case(1, 33, 33, 4, 2, 16, dtype=torch.float32), "backward", q, k, v, do)
    other = right._replace(backward=lambda: tuple(t.transpose(1, 2) for t in right.backward()), bhsd=True)
    kept = run.agreeing({"ours": right, "full": full, "other": other}, "backward", said.append)
    assert list(kept) == ["ours", "other"]
    assert len(said) == 1
    assert said[0].startswith("full: no row")
    operator, eager = right.backward(), right.gradient()
    for a, b in zip(operator, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_help_explains_itself():
    done = subprocess.run([sys.executable, "-m", "benchmarks.run", "--help"], capture_output=True, text=True, check=True)
    for word in (
        "python -m benchmarks.run forward backward --cases first-mark",
        "busy",
        "graph",
        "host",
        "--against",
        "--metric",
        "--rounds",
    ):
        assert word in done.stdout


def test_host_cost_times_every_row():
    """In a process of its own, since its bodies take the place of the operators'. A function whose arguments have changed would stop it."""
    pytest.importorskip("tilelang")
    once = [f"--{name}=1" for name in ("runs", "calls", "batch")]
    done = subprocess.run([sys.executable, "-m", "benchmarks.host_cost", *once], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    blocks = [block.splitlines() for block in done.stdout.split("\n\n")[1:]]
    assert [title for title, *_ in blocks] == ["no grad, parts", "no grad", "training forward", "forward + backward"]
    assert all(len(rows) > 4 for _, *rows in blocks)


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    steps, say = progress.tracked(["a", "b"], "shape")
    for step in steps:
        say(f"done {step}")
    assert capsys.readouterr().out.splitlines() == ["shape 1 of 2", "done a", "shape 2 of 2", "done b"]


@pytest.fixture
def without_gpu(monkeypatch):
    fake_gpu(monkeypatch)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_rows(without_gpu, op):
    """From the contestants to the rows; fa2 has a body for CPUs too."""
    args = run.arguments([op, "--metric", *run.METRICS, "--rounds", "2", "--repeats", "5"])
    case, said = Case(1, 64, 64, 4, 4, 32, causal=True, dtype=torch.float32), []
    found = run.rows(case, op, ["ours", "fa2"], args, {"run": "r", "gpu": "NVIDIA H200"}, said.append)
    assert said == []
    assert [(row["contestant"], row["metric"]) for row in found] == list(itertools.product(("ours", "fa2"), run.METRICS))
    busy, _span, _graph, _, _host = found[:5]
    assert [row["ms"]["p50"] for row in found[:5]] == [3.0, 3.1, 3.05, 3.2, 0.041]
    assert (busy["samples"], busy["trials"], busy["kernels_per_call"], busy["sm_mhz"]) == (10, 2, 2, 1980)
    assert busy["graph_over_busy"] == round(3.05 / 3, 3)
    assert [("error_ratio" in row) for row in found] == [True] * 5 + [False] * 5
    assert json.loads(json.dumps(busy))["case"] == rows.described(case)
    assert [line.split()[2] for line in run.summary(op, case, found)] == [f"{metric}:" for metric in run.METRICS]


def test_a_wrong_result_prints_no_number(without_gpu, monkeypatch):
    """Fault: the gate left out."""
    args = run.arguments(["forward"])
    right = gqa_autograd.attention
    monkeypatch.setattr(gqa_autograd, "attention", lambda *x, **options: right(*x, **{**options, "causal": False}))
    with pytest.raises(AssertionError, match="out: max error"):
        run.rows(Case(1, 64, 64, 4, 4, 32, causal=True), "forward", ["ours"], args, {}, lambda line: None)


def test_rows_of_a_pack(without_gpu):
    """The dense form beside it has a rate of its own, both FLOPs are told; with LSE the case says so. Fault: the pack's FLOPs for both."""
    args, said = run.arguments(["forward", "--rounds", "2", "--repeats", "5"]), []
    ours, lse, dense = run.rows(SMALL_PACK, "forward", ["ours", "ours-lse", "ours-dense", "flex"], args, {"run": "r"}, said.append)
    assert said == ["flex: no row for forward bf16-any3-T128-h4x2-d64-causal: no packed form of it is known here"]
    assert (ours["case"]["varlen"], ours["case"]["lengths"], ours["case"]["T"]) == ("any3", [50, 1, 77], 128)
    assert ours["case"] == dense["case"] == lse["case"] | {"lse": False}
    assert lse["case"]["lse"]
    assert ours["flops"] == 4 * 64 * 4 * (50 * 51 + 1 * 2 + 77 * 78) // 2
    assert (dense["instead"]["B"], dense["instead"]["S_q"]) == (2, 64)
    assert dense["flops"] == 4 * 64 * 4 * 2 * 64 * 65 // 2
    for row in (ours, dense):
        assert row["tflops"] == pytest.approx(row["flops"] / 3e-3 / 1e12, rel=1e-3)
        assert row["error_ratio"] <= 2


def test_a_pack_that_is_read_as_one_document_has_no_row(without_gpu, monkeypatch):
    """Faults: the gate, or the agreement, left out for packs."""
    args, said = run.arguments(["forward"]), []
    whole = lambda q, k, v, *_, **__: gqa_autograd.attention(q[None], k[None], v[None], causal=True)[0]  # noqa: E731
    monkeypatch.setitem(packed.CONTESTANTS, "fa2", lambda pack, op, *t: baselines.contestant(whole, "0", op, t))
    kept = run.agreeing(run.made(SMALL_PACK, "forward", ["ours", "fa2"], said.append), "forward", said.append)
    assert list(kept) == ["ours"]
    assert said[0].startswith("fa2: no row: its forward is")
    monkeypatch.setattr(gqa_autograd, "attention_varlen", whole)
    with pytest.raises(AssertionError, match="out: max error"):
        run.rows(SMALL_PACK, "forward", ["ours"], args, {}, lambda line: None)


def test_a_run_that_is_stopped_keeps_its_rows(without_gpu, monkeypatch, tmp_path):
    """Fault: the file written at the end."""
    small = [Case(1, S, S, 2, 1, 64, causal=True) for S in (33, 44, 55)]
    monkeypatch.setitem(cases.EVERY, "quick", small)
    argv = ["run", "forward", "--cases", "quick", "--against", "--dtype", "float16", "--results", str(tmp_path), "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    once = run.rows

    def stopped_at_the_last(case, *rest):
        if case.S_q == 55:
            raise KeyboardInterrupt
        return once(case, *rest)

    monkeypatch.setattr(run, "rows", stopped_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        run.main()
    kept = table.read("forward", tmp_path / "h200")
    assert [(row["case"]["S_q"], row["dtype"]) for row in kept] == [(33, "float16"), (44, "float16")]


# --- what is made of the rows ---
def test_table_takes_the_newest_whole_run_of_the_newest_metric(tmp_path):
    both = ("ours", "cudnn")
    old, new = ("old", "span", "first-mark", both), ("new", "busy", "first-mark", both)
    write(tmp_path, "forward", [old])
    assert {row["run"] for row in table.newest("forward", tmp_path)} == {"old"}
    (tmp_path / "forward.jsonl").unlink()
    write(tmp_path, "forward", [new, old, ("part", "busy", "window", both), ("alone", "busy", "first-mark", ("ours",))])
    assert {row["run"] for row in table.newest("forward", tmp_path)} == {"new"}
    assert table.tflops(table.newest("forward", tmp_path), 4, 2048, "ours") == 100


def test_dtypes_do_not_mix(tmp_path):
    """Fault: find() without the dtype. A later run in float16 changes nothing of bfloat16's tables but its own columns."""
    write(tmp_path, "forward", [("a", "busy", "peers", ("ours", "ours-lse", "cudnn"))])
    before = table.peers(tmp_path), table.lse(tmp_path)
    assert "fp16" not in before[0]
    write(tmp_path, "forward", [("b", "span", "quick", ("ours",)), ("c", "busy", "peers", ("ours", "cudnn"))], "float16")
    assert {row["run"] for row in table.newest("forward", tmp_path, cases.SETS["peers"])} == {"a"}
    assert table.lse(tmp_path) == before[1]
    assert table.peers(tmp_path).splitlines()[2] == before[0].splitlines()[2] + " 101 | 101 |"


def test_tables(tmp_path):
    """Fault: a ratio upside down."""
    write(tmp_path, "forward", [("p", "busy", "peers", ("ours", "ours-lse"))])
    assert table.lse(tmp_path).startswith(
        "With LSE the 13 shapes take 1.010 to 1.010 times as long as without, geometric mean 1.010 (H200,"
    )
    assert table.varlen(tmp_path) == table.small_grids(tmp_path) == ""
    write(tmp_path, "forward", [("v", "busy", "varlen", ("ours", "ours-dense")), ("s", "busy", "small-grids", ("ours", "cudnn"))])
    varlen, small = table.varlen(tmp_path).splitlines(), table.small_grids(tmp_path).splitlines()
    assert varlen[0].endswith("FA2 | 16k tokens | 64k tokens |")
    assert [line.count("|") for line in varlen] == [4] * 9
    assert varlen[2] == "| 8 documents, uniform | 100 / 100 (1.00) / - | 100 / 100 (1.00) / - |"
    assert [line.count("|") for line in small] == [6] * 8
    assert small[2] == "| 8/1 heads, S_kv S_q, causal |" + " 100.0 / 101.0 |" * 4
    assert "commit s: µs" in small[0]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path / "rows", "forward", [("a", "busy", "lengths", ("ours", "fa2")), ("b", "busy", "lengths", ("ours", "cudnn"))])
    drawn = plot.curves(table.newest("forward", tmp_path / "rows", cases.SETS["lengths"], ["ours"]))
    assert {name: lengths for name, (lengths, _) in drawn.items()} == {name: list(cases.PLOTTED) for name in ("ours", "cudnn")}
    assert plot.main(["--results", str(tmp_path / "rows"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "forward_tflops.png").stat().st_size > 5000
    assert not (tmp_path / "backward_tflops.png").exists()
