"""Makes trained_lm.pt: q, k, v and do of one attention layer of the example model after training, as numbers occur in use.

    python tests/gpu/data/capture.py        # 3 minutes on two idle CPU cores; same Python, torch and number of threads: the same bytes

The model of examples/train_lm.py with D 64 learns from the text that this Python carries, by a fixed seed, in float32. Then one batch goes
through it, and what reaches the attention of the last layer is kept: q and k behind their norm and RoPE, v, and the gradient of out. In
bfloat16; the test makes float16 of the same numbers. `do` is multiplied by the number of tokens, since the loss is their mean, which
float16 would lose. No text is in the file.
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[2]))
sys.path.append(str(HERE.parents[2] / "examples"))
from lm.settings import PRESETS, Settings  # noqa: E402
from lm.trainer import Trainer  # noqa: E402

STEPS, BATCH, S = 150, 2, 256
FILE = HERE / "trained_lm.pt"


def settings() -> Settings:
    return Settings(**{**PRESETS["cpu"], "layers": 2, "dim": 256, "heads": 4, "kv_heads": 2, "steps": STEPS, "batch": 4, "seq_len": S})


def capture(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What goes into the attention of the last layer, and the gradient of what comes out."""
    found = {}

    def keep(module, args, kwargs, out):
        found.update(zip("qkv", args[:3], strict=True))
        out.register_hook(lambda gradient: found.update(do=gradient * BATCH * S))

    handle = trainer.model.blocks[-1].attention.attention.register_forward_hook(keep, with_kwargs=True)
    batch = trainer.corpus.validation[: BATCH * (S + 1)].view(BATCH, S + 1).long()
    trainer._loss(trainer.model, (batch[:, :-1], batch[:, 1:])).backward()
    handle.remove()
    return {name: t.detach().bfloat16().contiguous() for name, t in found.items()}


def main() -> None:
    torch.set_num_threads(2)
    trainer = Trainer(settings(), torch.device("cpu"), compiled=False)
    for step in range(STEPS):
        loss = trainer.gradient()
        trainer.update()
        if step % 25 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    tensors = capture(trainer)
    torch.save(tensors, FILE)
    for name, t in tensors.items():
        print(name, tuple(t.shape), f"root mean square {t.float().square().mean().sqrt():.3g}, largest {t.float().abs().max():.3g}")
    print(FILE, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
