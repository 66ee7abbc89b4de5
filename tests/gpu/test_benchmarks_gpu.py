"""The benchmark harness measures what it should: fills, spins of known length, several streams and threads, a queue that is still full."""

import itertools
import statistics

import pytest
import torch
from torch.profiler import ProfilerActivity

from benchmarks import baselines, measure, profiled, run, trace
from benchmarks.packs import Pack
from gqa_autograd import testing
from gqa_autograd.testing import Case

pytestmark = pytest.mark.gpu
MEBI = 2**20


@pytest.fixture(scope="module")
def flush():
    return profiled.Flush()


def busy_us(function, flush, repeats=20, lead_us=200.0):
    return [r.busy_ns / 1e3 for r in profiled.checked_trial(function, flush, lead_us, repeats)]


def spin(microseconds):
    """A kernel that runs for so long: torch's busy loop, its cycles calibrated by events over two long spins, so that launches cancel."""
    cycles = 20_000_000
    profiled.warm_up(lambda: torch.cuda._sleep(5 * cycles))
    long, short = (profiled.event_us(lambda n=n: torch.cuda._sleep(n), 3) for n in (2 * cycles, cycles))
    count = int(microseconds * cycles / (long - short))
    return lambda: torch.cuda._sleep(count)


@pytest.mark.parametrize("microseconds", [100, 1000])
def test_spin_of_known_duration(flush, microseconds):
    assert statistics.median(busy_us(spin(microseconds), flush)) == pytest.approx(microseconds, rel=0.02)


def test_a_fill_is_found_and_is_not_the_flush(flush):
    """The same kernel as the flush, of another length. The graph's replays are the judge."""
    x = torch.empty(1024 * MEBI, dtype=torch.int8, device="cuda")
    repetitions = profiled.checked_trial(x.zero_, flush, 200, 20)
    assert {r.kernels for r in repetitions} == {1}
    assert all(r.busy_ns == r.span_ns for r in repetitions)
    busy = statistics.median(r.busy_ns for r in repetitions) / 1e3
    assert busy == pytest.approx(statistics.median(profiled.graph_us(x.zero_)), rel=0.05)
    assert busy > x.numel() / 4.8e6


def test_three_kernels(flush):
    x = torch.randn(3, MEBI, device="cuda")
    repetitions = profiled.checked_trial(lambda: [row.add_(1) for row in x], flush, 500, 10)
    assert {r.kernels for r in repetitions} == {3}
    assert all(0 < r.busy_ns <= r.span_ns for r in repetitions)


def test_copies_count(flush):
    x, y = torch.randn(2, MEBI, device="cuda")
    assert {r.kernels for r in profiled.checked_trial(lambda: y.copy_(x), flush, 200, 10)} == {1}


def test_nothing_launched_is_an_error(flush):
    with pytest.raises(trace.Inconsistent, match="launched nothing"):
        profiled.checked_trial(lambda: None, flush, 200, 10)


def test_a_number_that_varies_is_an_error(flush):
    x, turns = torch.zeros(1000, device="cuda"), itertools.count()

    def sometimes_twice():
        for _ in range(1 + next(turns) % 2):
            x.add_(1)

    with pytest.raises(trace.Inconsistent, match="differs"):
        profiled.checked_trial(sometimes_twice, flush, 200, 10)


def test_a_full_queue_changes_nothing(flush):
    """Leak 1: 50 ms of work are still queued when the measurement begins."""
    function, queued = spin(100), spin(50_000)
    before = statistics.median(busy_us(function, flush))
    queued()
    for _ in range(20):
        function()
    assert statistics.median(busy_us(function, flush)) == pytest.approx(before, rel=0.01)


def test_the_flush_acts_and_its_size_does_not_matter(flush):
    """16 MB fit in the cache: without a flush they are read faster, after a flush five times as long not more slowly."""
    x = torch.randn(4 * MEBI, device="cuda")
    y = torch.empty((), device="cuda")
    flushed, far = (statistics.median(busy_us(lambda: torch.amax(x, 0, out=y), f, 50)) for f in (flush, profiled.Flush(10)))
    kept = statistics.median(busy_us(lambda: torch.amax(x, 0, out=y), lambda us: None, 50))
    assert kept < 0.95 * flushed
    assert far == pytest.approx(flushed, rel=0.1)


def test_a_side_stream_is_detected_or_handled(flush):
    side, function = torch.cuda.Stream(), spin(100)

    def beside():
        with torch.cuda.stream(side):
            function()

    def joined():
        side.wait_stream(torch.cuda.current_stream())
        beside()
        torch.cuda.current_stream().wait_stream(side)

    with pytest.raises(trace.Inconsistent, match="another stream"):
        profiled.checked_trial(beside, flush, 1000, 10)
    assert statistics.median(busy_us(joined, flush)) == pytest.approx(100, rel=0.03)


def test_another_thread_is_detected(flush):
    """Autograd's engine launches from its own thread, unless it is told not to."""
    x = torch.randn(MEBI, device="cuda", requires_grad=True)
    out = x.sin()
    gradient = lambda: torch.autograd.grad(out, x, out.detach(), retain_graph=True)  # noqa: E731
    with pytest.raises(trace.Inconsistent, match="thread"):
        profiled.checked_trial(gradient, flush, 500, 10)
    with torch.autograd.set_multithreading_enabled(False):
        assert all(r.kernels >= 1 for r in profiled.checked_trial(gradient, flush, 500, 10))


def test_without_the_gpus_records_there_is_an_error(flush, monkeypatch):
    monkeypatch.setattr(profiled, "ACTIVITIES", (ProfilerActivity.CPU,))
    with pytest.raises(trace.NoDeviceActivity, match="CUPTI"):
        profiled.checked_trial(spin(100), flush, 200, 10)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_contestants_agree_and_are_plausible(op):
    """Ours is one kernel forward and three backward; torch's peers compute the same."""
    case, said = Case(1, 1024, 1024, 8, 2, 128, causal=True), []
    args = run.arguments([op, "--metric", "busy", "span", "graph", "host", "--rounds", "2", "--repeats", "10"])
    with measure.side_stream():
        made = run.made(case, op, ["ours", "cudnn", "fa2"], said.append)
        made = run.agreeing(made, op, said.append)
        found = run.measured(case, op, made, args)
    assert said == []
    assert list(found) == ["ours", "cudnn", "fa2"]
    for name, figures in found.items():
        assert [row["metric"] for row in figures] == ["busy", "span", "graph", "host"], name
        assert figures[0]["ms"]["p50"] <= figures[1]["ms"]["p50"]
    assert found["ours"][0]["kernels_per_call"] == {"forward": 1, "backward": 3}[op]


def test_fa2_aligns_the_ends_of_a_rectangle():
    said = []
    case = Case(1, 100, 300, 4, 2, 128, causal=True)
    made = run.made(case, "backward", ["ours", "cudnn", "fa2"], said.append)
    assert list(run.agreeing(made, "backward", said.append)) == ["ours", "fa2"]
    assert len(said) == 1
    assert said[0].startswith("cudnn: no row")


def test_fa2_has_a_window():
    """On its left alone, on both sides, and where the ends are aligned."""
    said = []
    for case in (
        Case(1, 300, 300, 4, 2, 128, causal=True, window=(63, -1)),
        Case(1, 300, 300, 4, 2, 64, window=(63, 17)),
        Case(1, 100, 300, 4, 2, 128, causal=True, window=(40, -1)),
    ):
        made = run.made(case, "forward", ["ours", "fa2"], said.append)
        assert list(run.agreeing(made, "forward", said.append)) == ["ours", "fa2"], said


def test_contestants_agree_on_a_pack():
    """In other forms too: with LSE the same bits, the dense form beside it by its own FLOPs."""
    pack, said = Pack("any", (700, 1, 130, 1000), 8, 2, 128), []
    args = run.arguments(["forward", "--metric", "busy", "--rounds", "2", "--repeats", "10"])
    with measure.side_stream():
        made = run.made(pack, "forward", ["ours", "ours-lse", "ours-dense", "fa2"], said.append)
        made = run.agreeing(made, "forward", said.append)
        assert torch.equal(made["ours"].forward(), made["ours-lse"].forward())
        found = run.measured(pack, "forward", made, args)
    assert said == []
    assert list(found) == ["ours", "ours-lse", "ours-dense", "fa2"]
    assert [found[name][0]["kernels_per_call"] for name in ("ours", "ours-lse", "ours-dense")] == [1, 1, 1]


def test_contestants_agree_on_the_gradients_of_a_pack():
    pack, said = Pack("any", (700, 1, 130, 1000), 8, 2, 128), []
    args = run.arguments(["backward", "--metric", "busy", "--rounds", "2", "--repeats", "10"])
    with measure.side_stream():
        made = run.agreeing(run.made(pack, "backward", ["ours", "ours-det", "ours-dense", "fa2"], said.append), "backward", said.append)
        found = run.measured(pack, "backward", made, args)
    assert said == []
    assert list(found) == ["ours", "ours-det", "ours-dense", "fa2"]


def test_flex_has_a_window_and_a_softcap():
    pytest.importorskip("triton")
    case = Case(1, 200, 300, 4, 2, 64, causal=True, window=(63, -1), softcap=20.0)
    tensors = testing.make(case, "cuda")
    contestant = baselines.flex(case, "backward", *tensors)
    assert contestant.backward is not None
    exact = testing.exact(case, *tensors)
    for mine, name in zip((contestant.forward(), *contestant.backward()), ("out", "dq", "dk", "dv"), strict=True):
        wanted = getattr(exact, name)
        assert (mine.transpose(1, 2).double() - wanted).norm() <= 0.03 * wanted.norm(), name


def test_clocks_are_sampled(flush):
    pytest.importorskip("pynvml")
    samples = measure.per_kernel({"spin": spin(2000)}, 2, 20)["spin"]
    assert samples.clocks.row()["sm_mhz"] > 300
    assert samples.clocks.row()["mem_mhz"] > 300
