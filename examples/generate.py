"""Continue prompts with the model that train_lm.py has trained: prefill, then a token for each prompt at a time from a KV cache.

    python examples/generate.py                                        # the checkpoint in runs/lm
    python examples/generate.py "def " "class " --temperature 0 --tokens 200
    python examples/generate.py --out runs/sdpa --top-p 0.9 --seed 3

Text appears as it is generated: of one prompt each byte, of several each line when it is whole. At the end: tokens/s of the steps, beside
the bound that reading weights and cache once a step sets, at the bandwidth that a copy reaches on this device.
"""

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path

import lm.checkpoint
import lm.options
import torch
from lm import data
from lm.generation import Generator, copy_bandwidth, synchronize
from lm.model import LanguageModel, Shape
from lm.settings import fail

PROMPTS = ["def ", "The ", "import os\n\n\nclass "]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="generate", description="Continue prompts with a model of train_lm.py.")
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="texts to continue; some are given")
    parser.add_argument("--out", type=Path, default=Path("runs/lm"), metavar="DIR", help="where checkpoint.pt is [%(default)s]")
    parser.add_argument("--tokens", type=int, default=400, metavar="N", help="bytes to generate for each prompt [%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest byte [%(default)s]")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="draw among the likeliest with this share [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws [%(default)s]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run without torch.compile and CUDA graphs")
    options = parser.parse_args(arguments)
    for name, ok, rule in (
        ("tokens", options.tokens >= 1, "at least 1"),
        ("temperature", 0 <= options.temperature < float("inf"), "finite and at least 0"),
        ("top-p", 0 < options.top_p <= 1, "above 0 and at most 1"),
    ):
        if not ok:
            fail(f"--{name} must be {rule}, got {getattr(options, name.replace('-', '_'))}", "generate")
    return options


def load(folder: Path, device: torch.device) -> LanguageModel:
    state = lm.checkpoint.load(folder / "checkpoint.pt", device, "--out", "generate")
    shape = Shape(**{field.name: state["settings"][field.name] for field in fields(Shape)})
    model = LanguageModel(shape, data.VOCABULARY).to(device)
    model.load_state_dict(state["model"])
    # Training on CUDA computes in bfloat16, too; read from memory as that, a step takes half the time
    return model.to(torch.bfloat16).eval() if device.type == "cuda" else model.eval()


class Printer:
    """Shows tokens as they come: at once of one prompt, a line at a time of several."""

    def __init__(self, prompts: list[str]) -> None:
        self._lines = list(prompts)
        self.texts = list(prompts)
        self._number = len(prompts) > 1
        if not self._number:
            print(data.decode(data.encode(prompts[0])), end="", flush=True)

    def show(self, tokens: list[int]) -> None:
        for b, token in enumerate(tokens):
            text = data.decode([token])
            self.texts[b] += text
            if not self._number:
                print(text, end="", flush=True)
                continue
            *whole, self._lines[b] = (self._lines[b] + text).split("\n")
            for line in whole:
                print(f"[{b + 1}] {line}", flush=True)

    def end(self) -> None:
        for b, line in enumerate(self._lines):
            print(f"[{b + 1}] {line}" if self._number else "")
            if not self._number:
                break


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = lm.options.device(options.device)
    model = load(options.out, device)
    prompts = [data.encode(text) for text in options.prompts]
    length = max(map(len, prompts)) + options.tokens
    if length > model.shape.context:
        fail(f"the longest prompt and --tokens must be at most the model's context of {model.shape.context}, got {length}", "generate")
    torch.manual_seed(options.seed)
    generator = Generator(model, length, len(prompts), options.temperature, options.top_p, options.compile)
    generator.prefill(prompts)
    printer, ends = Printer(options.prompts), []
    for tokens in generator.stream(options.tokens):
        printer.show(tokens)
        ends.append(time.perf_counter())
    synchronize(device)
    printer.end()
    # The first steps compile and capture
    steps = len(ends) - 1 - (skipped := min(3, len(ends) // 2))
    if steps > 0:
        speed = steps / (ends[-1] - ends[skipped])
        mean = [len(prompt) + (skipped + len(ends)) // 2 for prompt in prompts]
        bound = copy_bandwidth(device) / generator.bytes_of_step(mean)
        print(
            f"{len(prompts) * speed:,.0f} tokens/s in {steps} steps; at most {len(prompts) * bound:,.0f} by the bandwidth of a copy",
            end=" ",
        )
        print(f"({100 * speed / bound:.0f} %)", file=sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
