"""What train_lm.py prints about a run, and the plot and the sample at its end."""

import argparse
import statistics

import plot_lm
import torch

from . import data
from .log import Log
from .model import PEAK_FLOPS, train_flops_per_token
from .sample import sample
from .trainer import Trainer


def describe_speed(trainer: Trainer, tokens_per_s: float) -> str:
    text = f"{tokens_per_s:,.0f} tokens/s"
    if trainer.device.type == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        text += f"  MFU {tokens_per_s * train_flops_per_token(trainer.model, trainer.settings.seq_len) / PEAK_FLOPS:.1%}"
    return text


def introduce(trainer: Trainer, compiled: bool) -> None:
    s, corpus = trainer.settings, trainer.corpus
    weights = sum(weight.numel() for weight in trainer.model.parameters())
    print(f"{s.attention} attention on {trainer.device}, {weights / 1e6:.1f} M weights:", end=" ")
    print(f"{s.layers} layers of {s.dim}, {s.heads} query and {s.kv_heads} KV heads")
    print(f"{len(corpus.train):,} training and {len(corpus.validation):,} validation bytes;", end=" ")
    print(f"{s.batch} x {s.seq_len} a step, steps {trainer.step} to {s.steps}{', the first compiles' if compiled else ''}", flush=True)


def conclude(options: argparse.Namespace, trainer: Trainer, log: Log, seconds: float) -> None:
    if log.rows:
        speed = statistics.median(row["tokens_per_s"] for row in log.rows)
        # One batch is noisy
        end = statistics.fmean(row["loss"] for row in log.rows[-10:])
        print(f"training loss {log.rows[0]['loss']:.3f} -> {end:.3f} (mean of the last 10 steps); {seconds:.0f} s,", end=" ")
        print(f"compilation and validation included; median step {describe_speed(trainer, speed)}")
        plot_lm.draw_run(options.out / "log.jsonl", options.out / "curves.png")
    s = trainer.settings
    tokens = sample(trainer.model, data.encode(options.prompt), options.sample_bytes, s.seq_len, s.seed)
    if options.sample_bytes:
        print(f"--- sample ---\n{data.decode(tokens)}")
