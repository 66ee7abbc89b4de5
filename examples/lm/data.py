"""The data every CPython carries: its language reference (pydoc_data.topics) and the sources of its standard library, bytes as tokens."""

import hashlib
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor

VOCABULARY = 256
END = b"\0"

# Not every Python ships its tests. The code pages of `encodings` are near copies of each other, so a split by file would leak;
# pydoc_data is the language reference once more.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
_VALIDATION_SHARE = 0.08


class Corpus(NamedTuple):
    """Two packed streams, uint8 [T]: the documents one after the other, each closed by END."""

    train: Tensor
    validation: Tensor


def documents() -> list[bytes]:
    """Each entry of the language reference and each source file once, in an order that doesn't depend on the file system."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path.relative_to(library) for path in library.rglob("*.py"))
    texts = [topics[name].encode() for name in sorted(topics)]
    texts += [(library / file).read_bytes() for file in files if not _LEFT_OUT & set(file.parts)]
    return [text for text in dict.fromkeys(texts) if text.strip()]


def is_validation(document: bytes) -> bool:
    """By a hash of the content: the answer is the same on every machine, and equal documents land on the same side."""
    return int.from_bytes(hashlib.sha256(document).digest()[:4], "big") < _VALIDATION_SHARE * 2**32


def split(texts: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
    """(training documents, validation documents)"""
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for text in texts:
        sides[is_validation(text)].append(text)
    return sides


def load() -> Corpus:
    train, validation = split(documents())
    return Corpus(_pack(train), _pack(validation))


def _pack(texts: list[bytes]) -> Tensor:
    # Shuffled once, by a fixed seed: otherwise a window would rarely see both prose and code
    random.Random(0).shuffle(texts)
    return torch.frombuffer(bytearray(END.join(texts) + END), dtype=torch.uint8)


def batch(stream: Tensor, size: int, seq_len: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [size, seq_len] of one step: random windows of the stream, a pure function of (seed, step).

    Nothing is carried from step to step, so a resumed run sees the same data. Python's generator is seeded by all of its argument,
    torch's by its low 32 bits alone."""
    draw = random.Random(f"{seed}/{step}")
    return _windows(stream, [draw.randrange(len(stream) - seq_len) for _ in range(size)], seq_len)


def validation_batches(stream: Tensor, size: int, seq_len: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """`count` batches spread evenly over the stream, the same for every seed and step."""
    stride = (len(stream) - seq_len) // (size * count)
    starts = [i * stride for i in range(size * count)]
    return [_windows(stream, starts[i::count], seq_len) for i in range(count)]


def _windows(stream: Tensor, starts: list[int], seq_len: int) -> tuple[Tensor, Tensor]:
    rows = torch.stack([stream[start : start + seq_len + 1] for start in starts]).long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def encode(text: str) -> list[int]:
    """The bytes of the text; of an empty one the END that every document starts after."""
    return list(text.encode(errors="surrogateescape") or END)


def decode(tokens: Iterable[int]) -> str:
    """Printable ASCII, everything else as '?': a model can write any byte, a terminal must not obey it."""
    return "".join(chr(token) if 32 <= token < 127 or token == 10 else "?" for token in tokens)
