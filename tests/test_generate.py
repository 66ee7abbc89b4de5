"""examples/generate.py: the tokens of a generation without cache, draws as asked for, and the script as its user runs it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import generate  # noqa: E402
import lm.checkpoint  # noqa: E402
from lm.generation import Generator, choose  # noqa: E402
from lm.model import LanguageModel, Shape  # noqa: E402
from lm.settings import PRESETS, Settings  # noqa: E402
from lm.trainer import make_optimizer  # noqa: E402

SHAPE = Shape(layers=2, dim=32, heads=4, kv_heads=2, context=128, qk_norm=True)


@pytest.fixture
def model():
    """With weights of such a size that its tokens vary."""
    model = LanguageModel(SHAPE, 256).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.4)
    return model


@torch.no_grad()
def without_cache(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def generated(model, prompts, count, temperature=0.0, top_p=1.0, compiled=False):
    generator = Generator(model, max(map(len, prompts)) + count, len(prompts), temperature, top_p, compiled)
    generator.prefill(prompts)
    rows = list(zip(*generator.stream(count), strict=True))
    assert generator.cache.lengths.tolist() == [len(prompt) + count - 1 for prompt in prompts]
    return [list(row) for row in rows]


@pytest.mark.parametrize("lengths", [(5,), (1, 13, 70), (64, 3)], ids=str)
def test_same_tokens_as_without_a_cache(model, lengths):
    prompts = [torch.randint(256, (length,)).tolist() for length in lengths]
    got = generated(model, prompts, 17)
    assert got == [without_cache(model, prompt, 17) for prompt in prompts]
    assert max(len(set(row)) for row in got) > 5


def test_one_token(model):
    assert generated(model, [[1, 2, 3]], 1) == [without_cache(model, [1, 2, 3], 1)]


def test_compiled_steps_give_the_same_tokens(model, monkeypatch):
    """Traced and run without the C++ of Inductor, which takes half a minute."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="aot_eager", **options))
    prompts = [[7, 8, 9], [3] * 70]
    assert generated(model, prompts, 9, compiled=True) == [without_cache(model, prompt, 9) for prompt in prompts]


# --- draws ---
def test_temperature_0_is_the_likeliest():
    logits = torch.randn(5, 9)
    assert torch.equal(choose(logits, 0.0, 1.0), logits.argmax(-1))
    assert torch.equal(choose(logits, 0.7, 1e-6), logits.argmax(-1))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.35)])
def test_draws_have_their_shares(temperature, top_p):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.4, 0.9])
    share = torch.softmax(logits / temperature, 0)
    order = share.argsort(descending=True)
    # As few of the likeliest as reach top_p
    kept = next(n for n in range(1, 6) if share[order[:n]].sum() >= top_p - 1e-6)
    want = torch.zeros(5)
    want[order[:kept]] = share[order[:kept]] / share[order[:kept]].sum()
    drawn = choose(logits.expand(20000, 5), temperature, top_p).bincount(minlength=5) / 20000
    assert ((drawn == 0) == (want == 0)).all()
    # Five standard deviations of 20000 draws are at most 0.018
    torch.testing.assert_close(drawn, want, rtol=0, atol=0.018)


# --- the script ---
def run(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_script(tmp_path):
    """Of a checkpoint that train_lm.py has written: one prompt byte by byte, and the tokens that several get are those it gets alone."""
    sizes = ["--layers", 1, "--dim", 32, "--heads", 2, "--kv-heads", 1, "--context", 128, "--batch", 4, "--seq-len", 64]
    done = run(
        "train_lm.py", *sizes, "--steps", 30, "--lr", "2e-2", "--sample-bytes", 0, "--device", "cpu", "--no-compile", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    options = ["--out", tmp_path, "--temperature", 0, "--tokens", 12, "--device", "cpu", "--no-compile"]
    one = run("generate.py", "import os", *options)
    assert one.returncode == 0, one.stderr
    text, _, said = one.stdout.rstrip("\n").rpartition("\n")
    model = generate.load(tmp_path, torch.device("cpu"))
    prompts = [list(b"import os"), list(b"c")]
    wanted = [bytes(prompt) + bytes(without_cache(model, prompt, 12)) for prompt in prompts]
    assert text == lm.data.decode(wanted[0])
    assert "tokens/s in 8 steps; at most" in said
    assert "by the bandwidth of a copy (" in said
    two = run("generate.py", "import os", "c", *options)
    assert two.returncode == 0, two.stderr
    for b, want in enumerate(wanted, 1):
        lines = [line[4:] for line in two.stdout.splitlines() if line.startswith(f"[{b}] ")]
        assert "\n".join(lines) == lm.data.decode(want)


@pytest.fixture
def saved(model, tmp_path):
    settings = Settings(**{**PRESETS["cpu"], **dataclasses.asdict(SHAPE)})
    lm.checkpoint.save(tmp_path / "checkpoint.pt", model.float(), make_optimizer(model, torch.device("cpu")), 3, settings)
    return tmp_path


def test_a_seed_gives_the_same_text(saved, capsys):
    def text(seed):
        arguments = ["ab", "--out", saved, "--tokens", 20, "--seed", seed, "--top-p", 0.9, "--no-compile", "--device", "cpu"]
        generate.main([*map(str, arguments)])
        return capsys.readouterr().out.splitlines()[:-1]

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", 0], "--tokens must be at least 1, got 0"),
        (["--temperature", -1], "--temperature must be finite and at least 0, got -1.0"),
        (["--top-p", 0], "--top-p must be above 0 and at most 1, got 0.0"),
        (["--out", "nowhere"], "--out: there is no checkpoint nowhere/checkpoint.pt"),
        (["--tokens", 120], "the longest prompt and --tokens must be at most the model's context of 128, got 138"),
    ],
    ids=str,
)
def test_error(saved, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        generate.main([*map(str, ["--out", saved, "--device", "cpu", *arguments])])
    captured = capsys.readouterr()
    assert (exit.value.code, captured.out) == (2, "")
    assert captured.err == f"generate: error: {message}\n"
