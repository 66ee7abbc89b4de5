"""Checkpoints of train_lm.py: weights, optimizer, step and settings in one file, replaced whole or not at all."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .settings import Settings, fail

_KEYS = {"model", "optimizer", "step", "settings"}


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, settings: Settings) -> None:
    """The data and the learning rate are functions of (settings, step), so this is all that an exact resume needs."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "settings": asdict(settings)}
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    # Whoever reads `path` finds the old checkpoint or the new one, never half of one
    os.replace(unfinished, path)


def load(path: Path, device: torch.device, flag: str = "--resume", program: str = "train_lm") -> dict[str, Any]:
    """A checkpoint of train_lm; `flag` of `program` asked for it."""
    if not path.is_file():
        fail(f"{flag}: there is no checkpoint {path}", program)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    # What torch.load raises for a file that isn't its own is not one documented type
    except Exception as error:
        fail(f"{flag}: {path} can't be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}", program)
    if not isinstance(state, dict) or state.keys() != _KEYS:
        fail(f"{flag}: {path} is not a checkpoint of train_lm", program)
    return state


def restore(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The number of steps done."""
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        fail(f"--resume: the checkpoint doesn't fit this model: {str(error).splitlines()[0]}")
    return state["step"]
