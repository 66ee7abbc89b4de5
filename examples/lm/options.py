"""The command line of train_lm.py."""

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from .settings import PRESETS, fail

_HELP = {
    "layers": "transformer blocks",
    "dim": "width of the residual stream; a head has dim / heads entries",
    "heads": "query heads",
    "kv_heads": "key and value heads; heads must be a multiple",
    "context": "longest sequence the model takes",
    "steps": "optimizer steps in total, those before a resume included",
    "batch": "sequences a step",
    "seq_len": "tokens a sequence, at most --context",
    "lr": "peak learning rate",
    "eval_every": "steps from one validation to the next",
    "save_every": "steps from one checkpoint to the next; the end and Ctrl-C write one too",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def _number(convert: Callable[[str], Any], least: float, what: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text}")
        return value

    return read


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog="train_lm", description="Train a small language model on what every Python carries, with gqa_autograd's attention."
    )
    positive, count = _number(int, 1, "a positive integer"), _number(int, 0, "an integer, 0 or more")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    parser.add_argument("--attention", choices=("gqa", "sdpa"), help="gqa_autograd's (the default) or torch's, in the same model")
    for name, text in _HELP.items():
        kind = _number(float, 1e-12, "a positive number") if name == "lr" else positive
        preset = f" [CPU {PRESETS['cpu'][name]}, CUDA {PRESETS['cuda'][name]}]"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text + preset)
    parser.add_argument("--qk-norm", action=argparse.BooleanOptionalAction, help="RMSNorm of queries and keys [on]")
    parser.add_argument("--seed", type=count, metavar="N", help="of the initial weights, the data order and the sample [0]")
    parser.add_argument("--out", type=Path, default=Path("runs/lm"), metavar="DIR", help="log, plot and checkpoint go here [%(default)s]")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in DIR, with its settings where no flag is given"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run without torch.compile")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no bar; without a terminal there is none anyway")
    parser.add_argument("--sample-bytes", type=count, default=400, metavar="N", help="length of the text sampled at the end [%(default)s]")
    parser.add_argument("--prompt", default="def ", help="what the sample starts with [%(default)r]")
    return parser.parse_args(arguments)


def device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch sees no CUDA device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def folder(path: Path) -> Path:
    """`path`, made if need be. Permission bits say little to root or on a full disk, so a file is written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(os.urandom(1))
    except OSError as error:
        fail(f"--out: can't write to {path}: {error.strerror}")
    return path
