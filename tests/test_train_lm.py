"""examples/train_lm.py as its user runs it, with a tiny model: it learns, resumes bit for bit, stops cleanly, errs in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import lm.data  # noqa: E402
import lm.options  # noqa: E402
import plot_lm  # noqa: E402
import train_lm  # noqa: E402
from lm.log import Interrupt  # noqa: E402
from lm.model import LanguageModel, Shape, train_flops_per_token  # noqa: E402

SHAPE = ["--layers", "2", "--dim", "32", "--heads", "2", "--kv-heads", "1", "--context", "128"]
TINY = [
    *SHAPE,
    "--batch",
    "8",
    "--seq-len",
    "64",
    "--lr",
    "2e-2",
    "--eval-every",
    "10",
    "--device",
    "cpu",
    "--no-compile",
    "--sample-bytes",
    "5",
]
# One thread: another test beside this one must not make its threads wait for each other
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PNG = b"\x89PNG\r\n\x1a\n"


def command(script, *arguments):
    return [sys.executable, str(EXAMPLES / script), *map(str, arguments)]


def run(*arguments, script="train_lm.py", threads=1):
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command(script, *arguments), capture_output=True, text=True, env=environment, timeout=300)


def trained(out, *arguments):
    done = run(*TINY, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    return done, rows(out)


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(log):
    return [row["loss"] for row in log]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """20 steps in one go: (folder, finished process, rows of the log)"""
    out = tmp_path_factory.mktemp("whole")
    return out, *trained(out, "--steps", 20)


def test_learns(whole):
    _, done, log = whole
    assert [row["step"] for row in log] == list(range(1, 21))
    assert max(losses(log)[-3:]) < log[0]["loss"] - 1
    assert [row["step"] for row in log if row["val_loss"] is not None] == [10, 20]
    assert log[19]["val_loss"] < log[9]["val_loss"]
    assert all(row["tokens_per_s"] > 0 for row in log)
    assert "training loss" in done.stdout
    assert done.stdout.partition("--- sample ---\n")[2].startswith("def ")


def test_writes_a_plot(whole, tmp_path):
    out, _, _ = whole
    assert (out / "curves.png").read_bytes().startswith(PNG)
    plot_lm.draw_comparison(plot_lm.by_run(plot_lm.read([out / "log.jsonl"])), tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)


def test_resumes_bit_for_bit(whole, tmp_path):
    trained(tmp_path, "--steps", 10)
    _, log = trained(tmp_path, "--steps", 20, "--resume")
    assert losses(log) == losses(whole[2])
    assert log[19]["val_loss"] == whole[2][19]["val_loss"]


def test_interrupt_leaves_a_checkpoint(whole, tmp_path):
    # Checkpoints are 100 steps apart unless a signal writes one
    process = subprocess.Popen(
        command("train_lm.py", *TINY, "--out", tmp_path, "--steps", 100_000, "--save-every", 100_000),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "log.jsonl").is_file() or len(rows_so_far(tmp_path)) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (130, "")
    assert "interrupted" in stdout.splitlines()[-1]
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert step == len(rows(tmp_path)) >= 5
    assert not list(tmp_path.glob("*.tmp"))
    _, log = trained(tmp_path, "--steps", step + 3, "--resume")
    assert [row["step"] for row in log] == list(range(1, step + 4))
    shared = min(len(log), 20)
    assert losses(log)[:shared] == losses(whole[2])[:shared]


def step_with_a_signal(interrupt, done):
    with interrupt.held():
        signal.raise_signal(signal.SIGINT)
        done.append(1)


def test_interrupt_waits_for_the_end_of_a_step():
    before = signal.getsignal(signal.SIGINT)
    try:
        interrupt, done = Interrupt(), []
        with pytest.raises(KeyboardInterrupt):
            step_with_a_signal(interrupt, done)
        assert done
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def rows_so_far(out):
    return (out / "log.jsonl").read_text().splitlines()


def test_sdpa_trains_the_same_model(whole, tmp_path):
    _, log = trained(tmp_path, "--steps", 5, "--attention", "sdpa")
    assert {row["attention"] for row in log} == {"sdpa"}
    # Both compute in float32 and differ by the order of sums alone; a scale off by 1 % already gives 8e-6
    assert losses(log) == pytest.approx(losses(whole[2])[:5], rel=1e-6)


def test_compiled(tmp_path):
    """As eager up to the order of sums, and bit-equal when resumed, on two threads: atomic sums would differ."""
    arguments = [*[a for a in TINY if a != "--no-compile"], "--layers", 1, "--batch", 4, "--seq-len", 128, "--out"]
    for out, steps in (("whole", [8]), ("parts", [4]), ("parts", [8, "--resume"]), ("eager", [8, "--no-compile"])):
        done = run(*arguments, tmp_path / out, "--steps", *steps, threads=2)
        assert done.returncode == 0, done.stderr
    whole, parts, eager = (losses(rows(tmp_path / out)) for out in ("whole", "parts", "eager"))
    assert parts == whole
    assert eager == pytest.approx(whole, rel=1e-5)


# --- one-line errors ---
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "no CUDA device"),
        (["--seq-len", 129, *SHAPE], "--seq-len must be at most the model's context of 128, got 129"),
        (["--out", __file__ + "/sub"], "can't write"),
        (["--resume"], "there is no checkpoint"),
        (["--steps", 0], "argument --steps: must be a positive integer, got 0"),
        (["--batch", -1], "argument --batch: must be a positive integer, got -1"),
        (["--lr", "nan"], "argument --lr: must be a positive number, got nan"),
        (["--dim", "1.5"], "argument --dim: must be a positive integer, got 1.5"),
        (["--heads", 3], "--dim must be a multiple"),
        (["--heads", 4, "--kv-heads", 3], "--heads must be a multiple"),
        (["--attention", "flash"], "argument --attention"),
        (["--unknown"], "unrecognized"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value[:2])),
)
def test_error(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_line(["--out", tmp_path, *arguments], message, capsys)


def test_resume_errors(whole, tmp_path, capsys):
    out, _, _ = whole
    one_line(["--device", "cpu", "--out", out, "--resume", "--dim", 64], "the checkpoint has dim 32, not 64", capsys)
    one_line(["--device", "cpu", "--out", out, "--resume", "--seq-len", 500], "context of 128, got 500", capsys)
    (tmp_path / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:1000])
    one_line(["--device", "cpu", "--out", tmp_path, "--resume"], "can't be read", capsys)
    torch.save({"step": 3}, tmp_path / "checkpoint.pt")
    one_line(["--device", "cpu", "--out", tmp_path, "--resume"], "not a checkpoint", capsys)


def one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        train_lm.prepare(lm.options.parse(list(map(str, arguments))))
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.err.startswith("train_lm: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


def test_error_of_the_process(tmp_path):
    done = run("--device", "cpu", "--out", tmp_path, "--resume")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"train_lm: error: --resume: there is no checkpoint {tmp_path / 'checkpoint.pt'}\n"


def test_stops_where_the_loss_is_not_finite(tmp_path):
    done = run(*TINY, "--lr", "1e30", "--steps", 20, "--out", tmp_path)
    assert done.returncode == 2
    assert "train_lm: error: the loss of step" in done.stderr
    assert "Traceback" not in done.stderr
    # Nothing was saved over a good checkpoint
    assert not (tmp_path / "checkpoint.pt").exists()


# --- data, FLOPs, files ---
def test_split_is_disjoint():
    training, validation = lm.data.split(lm.data.documents())
    assert not set(training) & set(validation)
    assert len(set(training)) == len(training)
    share = sum(map(len, validation)) / sum(map(len, training + validation))
    assert 0.04 < share < 0.12
    # The same text once more, in another order, is split in the same way
    assert set(lm.data.split(reversed(training))[0]) == set(training)


def test_data_depend_on_seed_and_step_alone():
    stream = lm.data.load().train
    tokens, targets = lm.data.batch(stream, 2, 64, seed=1, step=7)
    again, _ = lm.data.batch(stream, 2, 64, seed=1, step=7)
    assert torch.equal(tokens, again)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    for seed, step in ((2, 7), (1, 8), (2**32 + 1, 7)):
        assert not torch.equal(tokens, lm.data.batch(stream, 2, 64, seed, step)[0])


def test_flops_against_the_operators_own_count():
    from torch.utils.flop_counter import FlopCounterMode

    model = LanguageModel(Shape(layers=2, dim=64, heads=4, kv_heads=2, context=64, qk_norm=True), lm.data.VOCABULARY)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 64, dtype=torch.long)).sum().backward()
    norms = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
    # The norms are no products; 6 N counts them, which is under a thousandth in a model of useful size
    assert counter.get_total_flops() == (train_flops_per_token(model, 64) - 6 * norms) * 3 * 64


def test_plot_lm_compares_runs(whole, tmp_path):
    log = tmp_path / "both.jsonl"
    other = [{**row, "attention": "sdpa", "loss": row["loss"] + 0.01} for row in whole[2]]
    log.write_text("".join(json.dumps(row) + "\n" for row in whole[2] + other))
    done = run(log, "--out", tmp_path / "c.png", "--data", tmp_path / "rows.jsonl", script="plot_lm.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 40


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) < 120
