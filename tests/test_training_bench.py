"""benchmarks.training on a CPU: FLOPs by hand, contestants that agree, recipes that do what they say, refusals, rows, table and page."""

import contextlib
import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure, training, training_model, training_table
from benchmarks.baselines import NoRow
from benchmarks.training_model import PEAK_FLOPS, Bench, Run, Shape
from gqa_autograd import SAVE_OPS, testing

ROOT = Path(__file__).resolve().parents[1]
S, LAYERS = 64, 2
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def bench(steps=2, seed=0):
    return Bench(Shape(LAYERS, 32, 4, 2, S, True), 2, steps, torch.device("cpu"), seed)


def options(*more):
    return training.arguments(f"--attention ours --lengths {S} --tokens {2 * S} --steps 1 --runs 2".split() + list(more))


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """The contestants of these tests: in eager, and the math backend where there is no cuDNN."""
    real = Bench.contestant
    monkeypatch.setattr(Bench, "contestant", lambda self, *names: real(self, *names, SDPBackend.MATH, None))
    monkeypatch.setitem(training_model.OPERATORS, "cudnn", ("aten::_scaled_dot_product_attention_math",) * 2)
    return real


# --- FLOPs and figures ---
def test_flops_by_hand():
    """Two layers of 8, 2 query heads of 4, 1 KV head, hidden 64; 3 tokens, 6 visible pairs; batch 5."""
    five = Bench(Shape(2, 8, 2, 1, 3, True), 5, 1, torch.device("cpu"))
    layer = (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8) + 3 * 8 * 64 + (8 + 8) + (4 + 4)
    weights = 2 * layer + 256 * 8 + 8
    attention = 2 * 2 * 6 * 4 * 4 * 3.5  # layers, heads, pairs, 4 D FLOPs, and a backward of 2.5 times that
    assert five.tokens == 15
    assert five.flops == 6 * weights * 15 + attention * 5


def test_figures_by_hand():
    found = training.figures(Run([100.0, 300.0, 200.0], 1.5, 2_500_000_000), flops=PEAK_FLOPS * 0.1, tokens=1000)
    assert found["tokens_per_s"] == 5000
    assert found["mfu"] == 0.5
    assert found["tflops"] == 494.5
    assert found["ms"] == {"p10": 100.0, "p50": 200.0, "p90": 300.0}
    assert found["peak_gb"] == 2.5


# --- contestants ---
def test_contestants_train_the_same_model():
    """One set of parameters, and in float32 the same loss and gradients; flex has no backward on a CPU."""
    here = bench()
    ours, math_, flex = (here.contestant(name, "none") for name in training_model.ATTENTIONS)
    for contestant in (ours, math_, flex):
        parameters = dict(contestant.forward.named_parameters())
        assert all(parameters[name] is weight for name, weight in here.weights.named_parameters())
    losses = [here.gradient(c, 0) for c in (ours, math_)]
    with torch.no_grad():
        losses.append(training_model.loss_of(flex.forward, *here.batches[0]))
    torch.testing.assert_close(losses[1:], [losses[0]] * 2, rtol=1e-5, atol=0)
    assert training.distance(here.first(math_, 1.0)[1], here.first(ours, 1.0)[1]) < 1e-4
    assert here.calls(ours) == {"forward": LAYERS, "backward": LAYERS}
    assert here.calls(flex) is None


def test_a_run_begins_anew():
    """The same losses whoever trained before; other ones by another seed."""
    here = bench(steps=3)
    ours, other = here.contestant("ours", "none"), here.contestant("cudnn", "none")
    first, between, again = here.run(ours, 1), here.run(other, 1), here.run(ours, 1)
    assert first.loss == again.loss == pytest.approx(between.loss, rel=1e-5)
    assert len(first.ms) == 2
    elsewhere = bench(steps=3, seed=1)
    assert elsewhere.run(elsewhere.contestant("ours", "none"), 1).loss != first.loss


def test_sdpa_kernel_and_flex_are_traced_whole(one_process, monkeypatch):
    """fullgraph, and the compiled graph has the operator of the backend that was asked for; on the GPU flex's gradient is compiled too."""
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    monkeypatch.setitem(training_model.OPERATORS, "cudnn", (flash, f"{flash}_backward"))
    here = bench()
    for backend, count in ((SDPBackend.MATH, 0), (SDPBackend.FLASH_ATTENTION, LAYERS)):
        contestant = one_process(here, "cudnn", "none", backend, "aot_eager")
        loss = here.gradient(contestant, 0)
        assert here.calls(contestant) == {"forward": count, "backward": count}
    flex = one_process(here, "flex", "none", compiler="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(training_model.loss_of(flex.forward, *here.batches[0]), loss, rtol=1e-5, atol=0)


# --- recipes ---
class Forwards(TorchDispatchMode):
    """Counts the forwards of attention that are run, not those that a checkpoint hands out again."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in SAVE_OPS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recipe", "again"), [("none", 0), ("full", 1), ("selective", 0)])
def test_recipe_in_eager(recipe, again):
    """full runs attention again in the backward, selective does not, though it runs the rest."""
    here = bench()
    contestant = here.contestant("ours", recipe)
    with Forwards() as forward:
        loss = training_model.loss_of(contestant.forward, *here.batches[0])
    with Forwards() as backward:
        loss.backward()
    assert (forward.count, backward.count) == (LAYERS, again * LAYERS)


def operators(here, contestant):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        here.gradient(contestant, 0)
    counts = {event.key: event.count for event in profile.key_averages()}
    return counts["gqa_autograd::attention_fwd_lse"], counts["aten::mm"]


def test_recipes_compiled(one_process):
    """Each has a graph of its own; products with weights run again under all but none, attention under full alone."""
    here = bench()
    found, gradients = {}, {}
    for recipe in training_model.RECIPES:
        contestant = one_process(here, "ours", recipe, compiler="aot_eager")
        _, gradients[recipe] = here.first(contestant, 0.1)
        found[recipe] = operators(here, contestant)
        assert training.distance(gradients[recipe], gradients["none"]) < 1e-5
    attention, products = ({recipe: pair[i] for recipe, pair in found.items()} for i in (0, 1))
    assert attention == {"none": LAYERS, "full": 2 * LAYERS, "selective": LAYERS, "budget": LAYERS}
    assert min(products[recipe] for recipe in ("full", "selective", "budget")) > products["none"]


def test_a_graph_of_another_contestant_is_an_error(one_process, monkeypatch):
    """A model that differs from one before in nothing but a setting of the compiler is served its graph."""
    here = bench()
    monkeypatch.setattr(training_model, "recipe", lambda name: None)
    here.first(one_process(here, "ours", "none", compiler="aot_eager"), 1.0)
    with pytest.raises(measure.Implausible, match="0 graphs"):
        here.first(one_process(here, "ours", "budget", compiler="aot_eager"), 0.1)


def test_selective_is_for_ours():
    with pytest.raises(NoRow, match="SAVE_OPS"):
        bench().contestant("cudnn", "selective")


# --- refusals and rows ---
def test_rows():
    said = []
    here = bench()
    found = training.rows(here, options("--checkpointing", "none", "selective"), {"run": "r", "gpu": "NVIDIA H200"}, said.append)
    assert [(row["case"]["checkpointing"], row["turn"]) for row in found] == [("none", 0), ("none", 1), ("selective", 0), ("selective", 1)]
    fields = {
        "op",
        "case",
        "dtype",
        "contestant",
        "metric",
        "turn",
        "tokens_per_s",
        "mfu",
        "flops",
        "tflops",
        "ms",
        "steps",
        "peak_gb",
        "loss",
    }
    fields |= {"warm_up_steps", "compile_s", "gradient_distance", "attention_calls", "compiled", "peer_version", "run", "gpu"}
    assert all(row.keys() == fields for row in found)
    case = {"example": "train_lm.py", "layers": LAYERS, "dim": 32, "H_q": 4, "H_kv": 2, "D": 8, "S": S, "batch": 2, "seed": 0}
    assert found[0]["case"] == {**case, "weights": sum(w.numel() for w in here.weights.parameters()), "checkpointing": "none"}
    assert found[0]["op"] == training_table.NAME.removesuffix(".jsonl")
    assert len({row["loss"] for row in found}) == 1
    json.dumps(found)
    assert len(training.summary(found)) == 2


@contextlib.contextmanager
def attending(monkeypatch, attend):
    with monkeypatch.context() as patch:
        patch.setattr(training_model, "torch_by", lambda backend: attend)
        yield


@pytest.mark.parametrize("fault", [{"is_causal": False}, {"is_causal": True, "scale": 1.1 * 8**-0.5}], ids=["mask", "scale"])
def test_another_attention_has_no_row(fault, monkeypatch):
    def attend(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **fault).transpose(1, 2)

    said, args = [], options("--attention", "ours", "cudnn")
    assert {row["contestant"] for row in training.rows(bench(), args, {}, said.append)} == {"ours", "cudnn"}
    with attending(monkeypatch, attend):
        found = training.rows(bench(), args, {}, said.append)
    assert {row["contestant"] for row in found} == {"ours"}
    assert "cudnn" in said[-1]
    assert "away from those of the first" in said[-1]


def test_a_contestant_that_breaks_has_no_row_but_ours_stops(monkeypatch):
    def attend(q, k, v):
        raise RuntimeError("no engine")

    said = []
    with attending(monkeypatch, attend):
        found = training.rows(bench(), options("--attention", "ours", "cudnn"), {}, said.append)
    assert {row["contestant"] for row in found} == {"ours"}
    assert "no engine" in said[-1]
    monkeypatch.setattr(training_model, "attention", lambda *_: (attend, ""))
    with pytest.raises(RuntimeError, match="no engine"):
        training.rows(bench(), options(), {}, said.append)


def test_another_operator_than_the_named_one_has_no_row(monkeypatch):
    monkeypatch.setitem(training_model.OPERATORS, "ours", ("aten::_scaled_dot_product_cudnn_attention", "gqa_autograd::attention_bwd"))
    said = []
    assert training.rows(bench(), options(), {}, said.append) == []
    assert "another attention computed" in said[0]


def test_another_loss_has_no_row(monkeypatch):
    real, said = Bench.run, []
    monkeypatch.setattr(Bench, "run", lambda self, c, n: real(self, c, n)._replace(loss=math.nan if c.attention == "cudnn" else 5.0))
    found = training.rows(bench(), options("--attention", "ours", "cudnn"), {}, said.append)
    assert {row["contestant"] for row in found} == {"ours"}
    assert "its loss is nan" in said[-1]
    assert training.agrees(5.02, 5.0)
    assert not training.agrees(5.03, 5.0)


def test_compiling_while_timed_is_an_error(monkeypatch):
    graphs = iter(range(100))
    here, args = bench(), options()
    ready = training.made(here, args, print)
    monkeypatch.setattr(training, "graphs_made", lambda: next(graphs))
    with pytest.raises(measure.Implausible, match="while it was timed"):
        training.in_turns(here, ready, args)


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--lengths", "100"], "must divide"), (["--runs", "0"], "at least 1"), (["--budget", "1.5"], "--budget must be from 0 to 1")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_argument_errors(given, message, capsys):
    with pytest.raises(SystemExit):
        training.arguments(given)
    assert message in capsys.readouterr().err


# --- the table and the page ---
def row(contestant, length, turn, speed, run="a", recipe="none", **more):
    case = {"layers": 4, "dim": 4096, "H_q": 32, "H_kv": 8, "D": 128, "S": length, "batch": 32768 // length, "weights": 873_501_696}
    case |= {"checkpointing": recipe} | ({"budget": 0.5} if recipe == "budget" else {})
    head = {"contestant": contestant, "run": run, "turn": turn, "gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "abc"}
    calls = {"forward": 8 if recipe == "full" else 4, "backward": 4}
    return {**head, "case": case, "tokens_per_s": speed, "mfu": speed / 2e5, "peak_gb": 50.0, "attention_calls": calls, **more}


def test_table_without_rows(tmp_path):
    assert training_table.text(tmp_path).count("There are no rows") == 2


def test_table_of_speeds():
    old = [row("ours", 2048, turn, 1.0, "old") for turn in range(3)]
    new = [row(who, 2048, turn, speed + turn) for who, speed in (("ours", 1e5), ("cudnn", 9e4)) for turn in range(3)]
    new += [row("ours", 2048, turn, 1.0, recipe="full") for turn in range(3)]
    found = training_table.speeds([*old, *new])
    assert "| 16 x 2048 | 100,001, 50.0% | 90,001, 45.0% | no row |" in found
    assert "| S 32768 | no row | no row | no row |" in found
    assert "874 M weights" in found
    assert "medians of 3 runs, at most 0.0% apart; commit abc." in found
    # Of runs with as many contestants the newest counts
    again = [{**one, "run": "b", "tokens_per_s": 2 * one["tokens_per_s"]} for one in new]
    assert "| 16 x 2048 | 200,002," in training_table.speeds([*old, *new, *again])


def test_table_of_recipes():
    rows = [row("ours", 8192, 0, speed, recipe=recipe) for recipe, speed in (("none", 1e5), ("full", 8e4), ("budget", 9e4))]
    found = training_table.recipes([*rows, row("cudnn", 8192, 0, 1.0, recipe="full")])
    assert "| none | 50.0 GB, 100,000 (1.00), 1 | no row |" in found
    assert "| full | 50.0 GB, 80,000 (0.80), 2 | no row |" in found
    assert "| selective | no row | no row |" in found
    assert "| budget 0.5 | 50.0 GB, 90,000 (0.90), 1 | no row |" in found
    # Rows of speeds alone are no rows of recipes
    assert "There are no rows" in training_table.recipes(rows[:1])


def test_page_shows_the_rows():
    assert training_table.placed(PAGE, training_table.text()) == PAGE, "run `python -m benchmarks.training_table --write`"
    with pytest.raises(AssertionError, match="the page has no"):
        training_table.placed("nothing", "")


def test_page_runs(monkeypatch):
    """Its blocks are one program. Each recipe gives the gradients of the plain model, and runs attention as often as it says."""
    # The partitioner has spent the budget when a backend gets the graph, and g++ would take a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    scope: dict = {"__name__": "__main__"}
    counts, expected = [], None
    for index, block in enumerate(blocks):
        if index:
            scope["model"].zero_grad()
        with testing.recorded() as bodies:
            exec(compile(block, f"docs/training.md, block {index}", "exec"), scope)
        counts.append((bodies.count("attention_fwd_lse"), bodies.count("attention_bwd")))
        gradients = [weight.grad.clone() for weight in scope["model"].parameters()]
        expected = gradients if expected is None else expected
        torch.testing.assert_close(gradients, expected)
    assert counts == [(2, 2), (4, 2), (2, 2), (2, 2), (2, 2)]
