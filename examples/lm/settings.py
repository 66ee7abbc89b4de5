"""What a run of train_lm.py computes: the defaults of each device, what a resumed run takes over, and what must hold."""

import argparse
import sys
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from .model import Shape


@dataclass(frozen=True)
class Settings(Shape):
    """What a run computes; it is stored in the checkpoint."""

    attention: str
    steps: int
    batch: int
    seq_len: int
    lr: float
    seed: int
    eval_every: int
    save_every: int


_BOTH = {"attention": "gqa", "qk_norm": True, "seed": 0}
_CPU = {"layers": 3, "dim": 128, "heads": 4, "kv_heads": 2, "context": 1024, "steps": 250, "batch": 8, "seq_len": 256}
_CUDA = {"layers": 12, "dim": 1024, "heads": 8, "kv_heads": 2, "context": 8192, "steps": 200, "batch": 24, "seq_len": 2048}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {**_BOTH, **_CPU, "lr": 3e-3, "eval_every": 50, "save_every": 100},
    "cuda": {**_BOTH, **_CUDA, "lr": 1e-3, "eval_every": 50, "save_every": 100},
}


def fail(message: str, program: str = "train_lm") -> NoReturn:
    print(f"{program}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def settle(options: argparse.Namespace, saved: dict[str, Any] | None, device: str) -> Settings:
    """A flag that is given wins, then the checkpoint, then the preset; but a checkpoint's shape can't be changed."""
    values = {**PRESETS[device], **(saved or {})}
    given = {field.name: value for field in fields(Settings) if (value := getattr(options, field.name)) is not None}
    for field in fields(Shape):
        if saved and given.get(field.name, values[field.name]) != values[field.name]:
            fail(f"--resume: the checkpoint has {field.name.replace('_', '-')} {values[field.name]}, not {given[field.name]}")
    settings = Settings(**{**values, **given})
    if settings.dim % (2 * settings.heads):
        fail(f"--dim must be a multiple of twice --heads (RoPE turns pairs), got {settings.dim} and {settings.heads}")
    if settings.heads % settings.kv_heads:
        fail(f"--heads must be a multiple of --kv-heads, got {settings.heads} and {settings.kv_heads}")
    if settings.seq_len > settings.context:
        fail(f"--seq-len must be at most the model's context of {settings.context}, got {settings.seq_len}")
    return settings
