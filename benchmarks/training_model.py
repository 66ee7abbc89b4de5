"""What benchmarks.training compares: attentions and checkpointing recipes around one set of weights, in the model of examples/train_lm.py.

All contestants of a length hold the same parameters, so that memory holds weights, gradients and optimizer once and a peak is that of one
contestant. Each run begins from the weights that the seed draws and takes the same batches.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import gqa_autograd

from .baselines import NoRow, dotted
from .measure import Implausible

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from lm import data
from lm.model import PEAK_FLOPS, Attend, Call, LanguageModel, Shape, loss_of, train_flops_per_token
from lm.trainer import apply_gradient, learning_rate, make_optimizer

__all__ = ["ATTENTIONS", "OPERATORS", "PEAK_FLOPS", "RECIPES", "Bench", "Contestant", "Run", "Shape"]
ATTENTIONS = ("ours", "cudnn", "flex")
RECIPES = ("none", "full", "selective", "budget")
# The largest rate of Llama's smaller models; a run is so short that it stays within the warm-up
LARGEST_LR = 3e-4
# What an attention runs, forward and backward, as torch.profiler names it. Flex is a Triton template without an operator
OPERATORS = {
    "ours": ("gqa_autograd::attention_fwd_lse", "gqa_autograd::attention_bwd"),
    "cudnn": ("aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_cudnn_attention_backward"),
}


def graphs_made() -> int:
    """By torch.compile, in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@functools.cache
def corpus() -> data.Corpus:
    return data.load()


# --- attentions ---
def torch_by(backend: SDPBackend) -> Attend:
    """torch's scaled_dot_product_attention by one backend and no other."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def flex(S: int, device: torch.device) -> Attend:
    """It is meant to be compiled, as a part of the model; in eager it runs its unfused definition."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    mask = create_block_mask(seen, None, None, S, S, device=device.type)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return attend


def attention(name: str, S: int, device: torch.device, backend: SDPBackend = SDPBackend.CUDNN_ATTENTION) -> tuple[Attend | None, str]:
    """What computes attention, None for GQAttention's own, and its version."""
    if name == "cudnn":
        return torch_by(backend), dotted(torch.backends.cudnn.version() or 0)
    return (flex(S, device), torch.__version__) if name == "flex" else (None, gqa_autograd.__version__)


# --- checkpointing ---
def called(block: torch.nn.Module, x: Tensor) -> Tensor:
    return block(x)


def recipe(name: str) -> Call | None:
    """How blocks are called."""
    if name == "budget":
        # The partitioner's affair and not the model's; but a model that differs in nothing would be served the graph of "none"
        return called
    if name == "full":
        return functools.partial(checkpoint, use_reentrant=False)
    if name == "selective":
        keep = functools.partial(create_selective_checkpoint_contexts, list(gqa_autograd.SAVE_OPS))
        return functools.partial(checkpoint, use_reentrant=False, context_fn=keep)
    return None


def partitioning(name: str, budget: float) -> contextlib.AbstractContextManager:
    """Holds while a model is compiled. Without the second setting a budget never keeps an operator that is not torch's own."""
    if name != "budget":
        return contextlib.nullcontext()
    return torch._functorch.config.patch(activation_memory_budget=budget, is_non_builtin_to_include=True)


# --- one length ---
class Contestant(NamedTuple):
    """The model with one attention and one recipe; forward is the model, compiled or not."""

    attention: str
    checkpointing: str
    version: str
    forward: Callable[[Tensor], Tensor]
    compiled: bool

    @property
    def name(self) -> str:
        return self.attention if self.checkpointing == "none" else f"{self.attention}, {self.checkpointing}"


class Run(NamedTuple):
    """Milliseconds of each timed step, the loss of the last one before its update, and the most bytes allocated in them (0 on a CPU)."""

    ms: list[float]
    loss: float
    peak_bytes: int


class Bench:
    """Weights, data and optimizer of one length."""

    def __init__(self, shape: Shape, batch: int, steps: int, device: torch.device, seed: int = 0):
        self.shape, self.batch, self.device, self.seed = shape, batch, device, seed
        with device:
            self.weights = LanguageModel(shape, data.VOCABULARY)
        stream = corpus().train
        # On the device before any time is taken: the model is measured and not the loader
        batches = (data.batch(stream, batch, shape.context, seed, step) for step in range(steps))
        self.batches = [(tokens.to(device), targets.to(device)) for tokens, targets in batches]
        self.restart()

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.shape.context

    @property
    def flops(self) -> float:
        """Of a step, whatever is computed again."""
        return train_flops_per_token(self.weights, self.shape.context) * self.tokens

    def restart(self) -> None:
        """The weights that the seed draws, and an optimizer that has seen nothing."""
        torch.manual_seed(self.seed)
        self.weights.reset_parameters()
        self.weights.zero_grad(set_to_none=True)
        self.optimizer = make_optimizer(self.weights, self.device)

    def contestant(
        self, name: str, checkpointing: str, backend: SDPBackend = SDPBackend.CUDNN_ATTENTION, compiler: str | None = "inductor"
    ) -> Contestant:
        """Around the parameters of self.weights, not copies. compiler None: in eager."""
        if checkpointing == "selective" and name != "ours":
            raise NoRow("SAVE_OPS names operators of gqa_autograd alone")
        attend, version = attention(name, self.shape.context, self.device, backend)
        with torch.device("meta"):
            model = LanguageModel(self.shape, data.VOCABULARY, attend, recipe(checkpointing))
        model.load_state_dict(self.weights.state_dict(keep_vars=True), assign=True)
        forward = torch.compile(model, fullgraph=True, dynamic=False, backend=compiler) if compiler else model
        return Contestant(name, checkpointing, version, forward, compiler is not None)

    def gradient(self, contestant: Contestant, step: int) -> Tensor:
        """The loss; its gradient is in the weights."""
        self.weights.zero_grad(set_to_none=True)
        loss = loss_of(contestant.forward, *self.batches[step])
        loss.backward()
        return loss.detach()

    def step(self, contestant: Contestant, step: int) -> Tensor:
        loss = self.gradient(contestant, step)
        apply_gradient(self.optimizer, learning_rate(LARGEST_LR, step))
        return loss

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def first(self, contestant: Contestant, budget: float) -> tuple[float, list[Tensor]]:
        """Seconds of the first forward and backward, in which torch.compile works, and the gradients of all q, k and v projections, each.

        They depend on mask and scale; after so few steps a loss hardly does. On the CPU, so that no peak holds them."""
        self.restart()
        started, graphs = time.perf_counter(), graphs_made()
        with partitioning(contestant.checkpointing, budget):
            self.gradient(contestant, 0)
        self.synchronize()
        seconds = time.perf_counter() - started
        if contestant.compiled and graphs_made() != graphs + 1:
            raise Implausible(f"{contestant.name}: torch.compile made {graphs_made() - graphs} graphs for it, not one of its own")
        gradients = {name: w.grad.cpu() for name, w in self.weights.named_parameters() if "attention" in name and w.grad is not None}
        return seconds, [torch.cat([g.flatten() for name, g in gradients.items() if f".{p}_proj." in name]) for p in "qkv"]

    def calls(self, contestant: Contestant) -> dict[str, int] | None:
        """How often a step runs the attention, forward and backward, by the profiler's count; None where nothing carries its name."""
        if contestant.attention not in OPERATORS:
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            self.gradient(contestant, 0)
            self.synchronize()
        counts = {event.key: event.count for event in profile.key_averages()}
        forward, backward = OPERATORS[contestant.attention]
        return {"forward": counts.get(forward, 0), "backward": counts.get(backward, 0)}

    def run(self, contestant: Contestant, warm_up: int) -> Run:
        """All steps from fresh weights, the first warm_up of them untimed."""
        self.restart()
        for step in range(warm_up):
            self.step(contestant, step)
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms, loss = [], torch.tensor(0.0)
        for step in range(warm_up, len(self.batches)):
            started = time.perf_counter()
            loss = self.step(contestant, step)
            self.synchronize()
            ms.append((time.perf_counter() - started) * 1e3)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return Run(ms, loss.item(), peak)
