"""One run of train_lm.py: the model, the optimizer and the data, one step at a time."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, data
from .model import LanguageModel, loss_of, torch_attention
from .settings import Settings

WARMUP_STEPS = 30
VALIDATION_BATCHES = 4
WEIGHT_DECAY = 0.1
LARGEST_GRADIENT = 1.0


def learning_rate(peak: float, step: int) -> float:
    """Linear warm-up, then 1 / sqrt(step): no horizon, so a run that is resumed for longer is the run that was longer from the start."""
    return peak * min((step + 1) / WARMUP_STEPS, math.sqrt(WARMUP_STEPS / (step + 1)))


def make_optimizer(model: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves the norms alone."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")


def apply_gradient(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One step with the gradients that the weights hold, cut to a length of at most LARGEST_GRADIENT."""
    torch.nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], LARGEST_GRADIENT)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


class Trainer:
    """`gradient` may be broken off at any point: it leaves the state of `step` steps, which `update` then advances by one."""

    def __init__(self, settings: Settings, device: torch.device, compiled: bool):
        self.settings, self.device, self.step = settings, device, 0
        # Compiled for a CPU, the embedding's gradient is summed by atomics, in any order, unless this is set; a GPU keeps its speed
        torch.use_deterministic_algorithms(device.type == "cpu")
        self.corpus = data.load()
        torch.manual_seed(settings.seed)
        # Drawn on the CPU, so that the initial weights are the same on every device
        attend = torch_attention if settings.attention == "sdpa" else None
        self.model = LanguageModel(settings, data.VOCABULARY, attend).to(device)
        # Shares the weights with the plain module, which validates, samples and is saved: a second graph would take longer to compile
        self.train_model = torch.compile(self.model, fullgraph=True) if compiled else self.model
        self.optimizer = make_optimizer(self.model, device)

    def gradient(self) -> float:
        """The loss of this step's batch, its gradient in the weights. Reading the number waits for the device."""
        s = self.settings
        self.optimizer.zero_grad()
        loss = self._loss(self.train_model, data.batch(self.corpus.train, s.batch, s.seq_len, s.seed, self.step))
        loss.backward()
        return loss.item()

    def update(self) -> None:
        apply_gradient(self.optimizer, learning_rate(self.settings.lr, self.step))
        self.step += 1

    @torch.no_grad()
    def validate(self) -> float:
        s = self.settings
        batches = data.validation_batches(self.corpus.validation, s.batch, s.seq_len, VALIDATION_BATCHES)
        return sum(self._loss(self.model, batch).item() for batch in batches) / len(batches)

    def _loss(self, model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(model, *(t.to(self.device) for t in batch))

    def save(self, path: Path) -> None:
        checkpoint.save(path, self.model, self.optimizer, self.step, self.settings)

    def restore(self, state: dict) -> None:
        self.step = checkpoint.restore(state, self.model, self.optimizer)
