"""Device work attributed to repetitions, by synthetic traces, and the checks that refuse a trace.

Each test has been seen to fail on the fault that it names, planted in benchmarks/trace.py."""

import itertools
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import trace
from benchmarks.trace import Inconsistent, NoDeviceActivity, Record

MAIN, ENGINE, STREAM, SIDE = 1, 2, 7, 9


class Trace:
    """A synthetic trace: the host goes on 10 µs a step, the device works off its stream in order."""

    def __init__(self):
        self.records, self.host, self.device, self.ids = [], 0, 0, itertools.count(1)

    def launch(self, name="kernel", ns=5000, thread=MAIN, stream=STREAM, at=None, kind="kernel", call="cudaLaunchKernel", lost=False):
        correlation = next(self.ids)
        self.host += 10_000
        self.records.append(Record("cuda_runtime", call, self.host, self.host + 2000, thread, correlation))
        start = max(self.device, self.host + 3000) if at is None else at
        if at is None:
            self.device = start + ns
        if not lost:
            self.records.append(Record(kind, name, start, start + ns, stream, correlation))

    def flush(self, ns=40_000):
        self.launch("fill", ns)

    def scope(self, index, body):
        self.host += 10_000
        start = self.host
        body()
        self.host += 10_000
        self.records.append(Record("user_annotation", f"{trace.SCOPE}{index}", start, self.host, MAIN, None, next(self.ids)))

    def repeat(self, count, *bodies):
        for index, body in zip(range(count), itertools.cycle(bodies)):
            self.flush()
            self.scope(index, body)
        return self


def times(made, count):
    return [tuple(repetition) for repetition in trace.repetitions(made.records, count)]


def test_one_kernel_a_call():
    made = Trace()
    assert times(made.repeat(3, made.launch), 3) == [(5000, 5000, 1)] * 3


def test_a_fill_under_test_is_told_from_the_flush():
    """Fault: device work attributed by name, the flush's name left out."""
    made = Trace()
    assert times(made.repeat(3, lambda: made.launch("fill", 7000)), 3) == [(7000, 7000, 1)] * 3


def test_what_was_launched_before_is_not_counted():
    """Leak 1: warm-up still queued when the window opens. Fault: device work attributed by its own time inside the scope."""
    made = Trace()
    for _ in range(20):
        made.launch("kernel", 500_000)
    assert times(made.repeat(2, made.launch), 2) == [(5000, 5000, 1)] * 2


def test_work_that_nobody_launched_is_refused():
    """Fault: a record without a launch is passed over."""
    made = Trace()
    made.repeat(2, made.launch)
    made.records.append(Record("kernel", "left over", 0, 100, STREAM, 10_000))
    with pytest.raises(Inconsistent, match="nobody"):
        times(made, 2)


def test_overlapping_kernels_count_once():
    """Fault: busy as the sum of durations. A gap is in the span only."""
    made = Trace()

    def body():
        made.launch("a", 10_000)
        start = made.device
        made.launch("b", 10_000, at=start - 4000)
        made.launch("c", 2000, at=start + 9000)
        made.device = start + 11_000

    assert times(made.repeat(2, body), 2) == [(18_000, 21_000, 3)] * 2


def test_memset_and_memcpy_of_the_call_count():
    """Fault: kernels alone."""
    made = Trace()

    def body():
        made.launch("Memset (Device)", 1000, kind="gpu_memset", call="cudaMemsetAsync")
        made.launch("Memcpy DtoD", 1000, kind="gpu_memcpy", call="cudaMemcpyAsync")

    assert [repetition[2] for repetition in times(made.repeat(2, body), 2)] == [2, 2]


def test_a_launch_that_the_profiler_does_not_record_is_found_by_its_operator():
    """Fault: no second rule. The operators have the numbers that CUPTI gave two other calls: the two kinds of ids must not mix."""
    made, numbers = Trace(), itertools.count(1)

    def body():
        number, made.host = next(numbers), made.host + 10_000
        made.records.append(Record("cpu_op", "op", made.host, made.host + 2000, MAIN, None, number))
        made.records.append(Record("kernel", "launched by the driver", made.device, made.device + 3000, STREAM, 7000 + number, number))
        made.device += 3000

    assert times(made.repeat(2, body), 2) == [(3000, 3000, 1)] * 2


def test_no_kernel_in_a_repetition():
    """Fault: without the check the call is free."""
    made = Trace()
    with pytest.raises(Inconsistent, match="repetition 0 launched nothing"):
        times(made.repeat(3, lambda: None), 3)


def test_a_number_that_varies():
    """Fault: the total divided by the repetitions."""
    made = Trace()
    with pytest.raises(Inconsistent, match=r"differs between repetitions: \[1, 2\]"):
        times(made.repeat(4, made.launch, lambda: (made.launch(), made.launch())), 4)


def test_lost_records():
    """Fault: launches not compared with records. In every repetition one, so that the number of kernels does not vary."""
    made = Trace()
    with pytest.raises(Inconsistent, match="lost"):
        times(made.repeat(3, lambda: (made.launch(), made.launch(lost=True))), 3)


def test_a_call_inside_a_call_is_no_second_launch():
    made = Trace()
    made.repeat(2, made.launch)
    for call in [r for r in made.records if r.kind == "cuda_runtime"]:
        made.records.append(Record("cuda_driver", "cuLaunchKernel", call.start + 1, call.end - 1, MAIN, 5000 + call.correlation))
    assert times(made, 2) == [(5000, 5000, 1)] * 2


def test_calls_that_launch_nothing_need_no_record():
    made = Trace()

    def body():
        made.launch()
        made.records.append(Record("cuda_runtime", "cudaFuncGetAttributes", made.host + 3000, made.host + 3100, MAIN, next(made.ids)))

    assert times(made.repeat(2, body), 2) == [(5000, 5000, 1)] * 2


def test_another_thread():
    """Autograd's engine. Fault: the thread is not looked at."""
    made = Trace()
    with pytest.raises(Inconsistent, match="set_multithreading_enabled"):
        times(made.repeat(2, lambda: made.launch(thread=ENGINE)), 2)


def test_a_side_stream_beside_the_flush():
    """Fault: no check of the order on the device."""
    made = Trace()
    with pytest.raises(Inconsistent, match="another stream"):
        times(made.repeat(3, lambda: made.launch(stream=SIDE, at=made.device - 20_000)), 3)


def test_a_side_stream_that_waits():
    made = Trace()
    assert times(made.repeat(3, lambda: made.launch(stream=SIDE)), 3) == [(5000, 5000, 1)] * 3


def test_a_scope_is_missing():
    made = Trace()
    made.repeat(3, made.launch)
    with pytest.raises(Inconsistent, match="3 timed scopes"):
        times(made, 4)


def test_without_cupti(tmp_path):
    """A real profile of the CPU: the scopes are read from it, and the want of a GPU is an error."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for i in range(3):
            torch.zeros(10)
            with record_function(f"{trace.SCOPE}{i}"):
                torch.ones(10)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    records = trace.read(tmp_path / "trace.json")
    scopes = [r for r in records if r.name.startswith(trace.SCOPE)]
    inside = [r for r in records if r.name == "aten::ones"]
    assert [s.start <= r.start <= r.end <= s.end and s.thread == r.thread for s, r in zip(scopes, inside, strict=True)] == [True] * 3
    with pytest.raises(NoDeviceActivity, match="CUPTI"):
        trace.repetitions(records, 3)


def test_read_takes_the_device_from_a_trace(tmp_path):
    """The form of torch.profiler's export: microseconds with three decimals, ids among the arguments."""
    event = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 4422378013156.769, "dur": 49.834}
    event["args"] = {"External id": 3, "correlation": 12, "stream": 7}
    projected = {**event, "cat": "gpu_user_annotation", "name": f"{trace.SCOPE}0"}
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "x"}, event, projected]}))
    (record,) = trace.read(tmp_path / "t.json")
    assert abs(record.start - 4422378013156769) <= 1
    assert (record.end - record.start, record.thread, record.correlation, record.external) == (49_834, 7, 12, 3)
