"""Text from a trained model, without a cache."""

import torch

from .model import LanguageModel, autocast


@torch.inference_mode()
def sample(model: LanguageModel, prompt: list[int], count: int, window: int, seed: int, temperature: float = 0.8) -> list[int]:
    """`count` more tokens. No cache: every token runs the whole window anew, always of one length, padded on the right where
    causality keeps it unseen."""
    device = model.embedding.weight.device
    draw = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        seen = tokens[-window:]
        row = torch.tensor([seen + [0] * (window - len(seen))], device=device)
        with autocast(device):
            logits = model(row)[0, len(seen) - 1]
        odds = torch.softmax(logits.float().cpu() / temperature, dim=0)
        tokens.append(int(torch.multinomial(odds, 1, generator=draw)))
    return tokens
