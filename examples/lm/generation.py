"""Text from a trained model with a KV cache: prefill of prompts of different lengths, then a token for each at a time.

A step is one compiled graph, on CUDA captured in a CUDA graph: nothing in it waits for the host, and the host reads a step's tokens while
the device is at the next one."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gqa_autograd import KVCache

from .model import LanguageModel


def choose(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """A token [B] of each row of logits [B, vocabulary]: the likeliest at temperature 0; else drawn among the likeliest, as few as have
    together a share of top_p."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    share, token = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    share = share.masked_fill(share.cumsum(dim=-1) - share >= top_p, 0)
    # The first of several clocks to ring, each as fast as its share: a draw that the host has no part in
    first = (share / torch.empty_like(share).exponential_()).argmax(dim=-1, keepdim=True)
    return token.gather(1, first).squeeze(1)


class Generator:
    """Continues `prompts`, each at least one token, up to `length` tokens with the longest of them.

    The cache has the dtype of the weights. Weights are read whole at each step: bfloat16 on CUDA."""

    def __init__(self, model: LanguageModel, length: int, batch: int, temperature: float, top_p: float, compiled: bool) -> None:
        shape, weight = model.shape, model.embedding.weight
        size = shape.dim // shape.heads
        self.model, self.temperature, self.top_p = model, temperature, top_p
        self.device = weight.device
        self.cache = KVCache(batch, length, shape.kv_heads, size, layers=shape.layers, dtype=weight.dtype, device=self.device)
        self.tokens = torch.zeros(batch, dtype=torch.long, device=self.device)
        self._run: Callable[[], Any] = torch.compile(self._step, fullgraph=True) if compiled else self._step
        self._captured = not (compiled and self.device.type == "cuda")
        self._steps = 0

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> None:
        """The prompts padded on the right, where causality keeps the padding unseen; then the cache forgets it."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=self.device)
        longest = max(map(len, prompts))
        rows = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.device)
        logits = self.model(rows, self.cache)
        self.cache.crop(lengths)
        last = logits[torch.arange(len(prompts), device=self.device), lengths.long() - 1]
        self.tokens.copy_(choose(last, self.temperature, self.top_p))

    def _step(self) -> None:
        logits = self.model(self.tokens.unsqueeze(1), self.cache)[:, -1]
        self.tokens.copy_(choose(logits, self.temperature, self.top_p))

    @torch.inference_mode()
    def step(self) -> None:
        """The next token of each sequence, in `tokens`. The second step is captured, once the first has compiled; later ones replay it."""
        if not self._captured and self._steps > 0:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
            self._run, self._captured = graph.replay, True
        self._run()
        self._steps += 1

    def stream(self, count: int) -> Iterator[list[int]]:
        """`count` tokens of each sequence, those of the prefill first: each is handed over while the next is being computed."""
        cuda = self.device.type == "cuda"
        sent = torch.empty((2, len(self.tokens)), dtype=torch.long, pin_memory=cuda)
        arrived = [torch.cuda.Event() for _ in range(2)] if cuda else []
        for n in range(count + 1):
            if n < count:
                sent[n % 2].copy_(self.tokens, non_blocking=True)
                if cuda:
                    arrived[n % 2].record()
                if n < count - 1:
                    self.step()
            if n > 0:
                if cuda:
                    arrived[(n - 1) % 2].synchronize()
                yield sent[(n - 1) % 2].tolist()

    def bytes_of_step(self, lengths: list[int]) -> int:
        """What a step must at least read: all weights, and the keys and values of sequences of these lengths."""
        row = sum(t[0, 0].numel() * t.element_size() for t in (*self.cache.k, *self.cache.v))
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters()) + row * sum(lengths)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes, the best of several."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
