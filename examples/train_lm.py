"""Train a small Llama-like language model with gqa_autograd on the language reference and the library sources of this very Python.

    python examples/train_lm.py                                   # minutes on two CPU cores, about one on an H200
    python examples/train_lm.py --attention sdpa --out runs/sdpa  # the same weights and data, torch's attention
    python examples/train_lm.py --resume --steps 600              # go on from the checkpoint

DIR/log.jsonl gets one row a step, DIR/curves.png shows them, DIR/checkpoint.pt is what --resume and generate.py read. On a CPU a resumed
run gives the losses of an uninterrupted one bit for bit (same Python, same number of threads): data and learning rate are functions of
seed and step.
MFU counts the FLOPs of `lm.model.train_flops_per_token` against the dense bfloat16 peak of an H100 or H200.
"""

import argparse
import math
import os
import time
from pathlib import Path

import lm.checkpoint
import lm.options
from lm.log import Interrupt, Log
from lm.report import conclude, describe_speed, introduce
from lm.settings import fail, settle
from lm.trainer import Trainer
from tqdm import tqdm

INTERRUPTED = 130


def prepare(options: argparse.Namespace) -> tuple[Trainer, Log]:
    device, out = lm.options.device(options.device), lm.options.folder(options.out)
    checkpoint = out / "checkpoint.pt"
    state = lm.checkpoint.load(checkpoint, device) if options.resume else None
    trainer = Trainer(settle(options, state and state["settings"], device.type), device, options.compile)
    if state:
        trainer.restore(state)
    elif checkpoint.exists():
        # A forgotten --resume should not cost anyone a day of training
        os.replace(checkpoint, out / "checkpoint.old.pt")
        print(f"train_lm: a new run; the earlier checkpoint in {out} is now checkpoint.old.pt")
    return trainer, Log(out / "log.jsonl", trainer.step)


def train(trainer: Trainer, log: Log, checkpoint: Path, interrupt: Interrupt, progress: bool) -> None:
    s = trainer.settings
    # disable=None: no bar where the output is not a terminal
    with tqdm(total=s.steps, initial=trainer.step, unit="step", disable=None if progress else True) as bar:
        while trainer.step < s.steps:
            started = time.perf_counter()
            loss = trainer.gradient()
            if not math.isfinite(loss):
                fail(f"the loss of step {trainer.step + 1} is {loss}; try a smaller --lr, --resume starts from the last checkpoint")
            with interrupt.held():
                trainer.update()
                speed = s.batch * s.seq_len / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
                bar.update()
                last = trainer.step == s.steps
                validation = trainer.validate() if last or trainer.step % s.eval_every == 0 else None
                log.write(
                    attention=s.attention, seed=s.seed, step=trainer.step, loss=loss, val_loss=validation, tokens_per_s=round(speed, 1)
                )
                if validation is not None:
                    bar.write(f"step {trainer.step:5}  loss {loss:.4f}  validation {validation:.4f}  {describe_speed(trainer, speed)}")
                if last or trainer.step % s.save_every == 0:
                    trainer.save(checkpoint)


def main() -> int:
    interrupt = Interrupt()
    options = lm.options.parse()
    trainer, log = prepare(options)
    checkpoint = options.out / "checkpoint.pt"
    introduce(trainer, options.compile)
    started = time.perf_counter()
    try:
        train(trainer, log, checkpoint, interrupt, options.progress)
    except KeyboardInterrupt:
        interrupt.ignore()
        trainer.save(checkpoint)
        print(f"train_lm: interrupted; {checkpoint} holds step {trainer.step}, --resume continues")
        return INTERRUPTED
    conclude(options, trainer, log, time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("train_lm: interrupted")
        raise SystemExit(INTERRUPTED) from None
    # NotImplementedError is how gqa_autograd says which sizes it has kernels for
    except (OSError, NotImplementedError) as error:
        fail(str(error))
