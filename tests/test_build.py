"""kernels.build without a compiler: one build per configuration, by one thread and one process at a time."""

import itertools
import multiprocessing
import threading
import time

import pytest

from gqa_autograd.kernels import build


class Factory:
    """Stands in for a @tilelang.jit function: a slow compile that notes when it ran."""

    def __init__(self, log):
        self.log = log

    def compile(self, *configuration):
        start = time.monotonic()
        time.sleep(0.15)
        with self.log.open("a") as file:
            file.write(f"{configuration[0]} {start} {time.monotonic()}\n")
        return object()


def get(name, factory, configuration):
    return build.kernel(build.Program(name, factory, (configuration,)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_kernels", {})


def intervals(log) -> list[tuple[str, float, float]]:
    return sorted((name, float(start), float(end)) for name, start, end in map(str.split, log.read_text().splitlines()))


def test_threads_share_one_build(tmp_path):
    factory, found = Factory(tmp_path / "log"), []
    threads = [threading.Thread(target=lambda: found.append(get("k", factory, "a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(intervals(tmp_path / "log")) == 1
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert build.built() == 1


def test_a_configuration_is_part_of_the_key(tmp_path):
    """FA#2402, flashinfer#4014, tilelang#2662: A, then B, in one process."""
    factory = Factory(tmp_path / "log")
    a, b, other = get("k", factory, "a"), get("k", factory, "b"), get("l", factory, "a")
    assert len({id(a), id(b), id(other)}) == 3
    assert get("k", factory, "a") is a
    assert build.built() == 3


def _build(log):
    build._kernels.clear()
    get("k", Factory(log), "a")


def test_processes_take_turns(tmp_path):
    """Each process has its own memory and builds once, but never two of them the same kernel at one time."""
    log = tmp_path / "log"
    processes = [multiprocessing.get_context("spawn").Process(target=_build, args=(log,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    ran = sorted((start, end) for _, start, end in intervals(log))
    assert len(ran) == 3
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(ran))


def test_a_cache_folder_that_can_not_be_written_does_not_stop_a_build(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path / "file"))
    assert get("k", Factory(tmp_path / "log"), "a") is not None


def test_a_failed_build_is_not_remembered(tmp_path):
    class Broken:
        def compile(self, *configuration):
            raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        get("k", Broken(), "a")
    assert build.built() == 0
    assert get("k", Factory(tmp_path / "log"), "a") is not None
