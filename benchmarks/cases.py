"""Shapes that the benchmarks run. Named sets, so that a row's case can be run again by name."""

from gqa_autograd.testing import Case

from .packs import PACKS, Pack

LENGTHS = (2048, 4096, 8192, 16384)
PLOTTED = (512, 1024, 2048, 4096, 8192, 16384, 32768)

SMALL, SMALL_KEYS, SMALL_HEADS = (64, 128, 256, 512), 8192, ((8, 1), (32, 8))
SMALL_TRAINING = (256, 512, 1024, 2048)


def _llama(B: int, S_q: int, S_kv: int | None = None, **options) -> Case:
    """32 query heads, 8 KV heads, D 128, causal."""
    return Case(B, S_q, S_q if S_kv is None else S_kv, 32, 8, 128, **{"causal": True, **options})


def _decode(B: int, S_q: int, S_kv: int, H_q: int, H_kv: int, D: int = 128) -> Case:
    """Full caches; the new tokens are the last of them."""
    return Case(B, S_q, S_kv, H_q, H_kv, D, causal=True)


# Of these there are figures of peers
_DECODE_PEERS = (
    *(_decode(B, 1, S, *heads) for B, S, heads in ((4, 65536, (96, 8)), (1, 131072, (32, 8)), (16, 8192, (32, 8)), (64, 4096, (64, 8)))),
    _decode(8, 1, 32768, 12, 1),
)
# One token by the head counts of models; the caches take 8 MB to 4.3 GB
_DECODE_MODELS = (
    *(_decode(B, 1, S, 96, 8) for B, S in ((1, 131072), (16, 8192), (64, 4096))),
    *(_decode(B, 1, S, 32, 8) for B, S in ((1, 8192), (8, 4096), (32, 4096), (32, 32768))),
    *(_decode(B, 1, S, 64, 8) for B, S in ((1, 2048), (1, 8192), (8, 32768), (32, 8192), (1, 131072))),
    _decode(128, 1, 8192, 8, 1),
    _decode(8, 1, 16384, 128, 8),
    *(_decode(16, 1, 16384, *heads) for heads in ((28, 4), (40, 8), (24, 8))),
    _decode(32, 1, 8192, 12, 2),
    _decode(16, 1, 2048, 71, 1, 64),
    *(_decode(1, 1, S, 32, 4) for S in (4096, 65536, 262144)),
    _decode(8, 1, 32768, 32, 2, 256),
)
_DECODE_QUERIES = (
    *(_decode(8, S_q, 32768, 64, 8) for S_q in (1, 2, 4, 8, 16)),
    _decode(4, 4, 65536, 96, 8),
    _decode(4, 64, 16384, 96, 8),
)

# Up to 8k tokens in every row of first-mark: B 4, 2, 1, 1
SETS = {
    "first-mark": tuple(_llama(max(1, 8192 // S), S) for S in LENGTHS),
    "quick": (_llama(4, 512), _llama(2, 4096)),
    "batch-1": tuple(_llama(1, S) for S in LENGTHS),
    "shapes": (
        _llama(2, 4096, causal=False),
        Case(8, 2048, 2048, 16, 16, 128, causal=True),
        _llama(4, 512),
        Case(2, 4096, 4096, 32, 8, 64, causal=True),
        Case(1, 8192, 8192, 16, 4, 256, causal=True),
    ),
    "peers": (
        Case(8, 2048, 2048, 16, 16, 128, causal=True),
        Case(1, 16384, 16384, 16, 16, 128, causal=True),
        Case(1, 16384, 16384, 16, 16, 128),
        _llama(4, 2048),
        _llama(2, 4096),
        _llama(1, 8192),
        _llama(1, 32768),
        _llama(2, 4096, causal=False),
        _llama(2, 512, 4096),
        _llama(4, 512),
        Case(2, 4096, 4096, 64, 8, 128, causal=True),
        Case(2, 4096, 4096, 32, 8, 64, causal=True),
        Case(1, 8192, 8192, 16, 4, 256, causal=True),
    ),
    # 16k tokens in every row, as far as one sequence holds no more: what plot.py draws
    "lengths": tuple(_llama(max(1, 16384 // S), S) for S in PLOTTED),
    "window": tuple(_llama(max(1, 16384 // S), S, window=(left, -1)) for S in (4096, 16384, 32768) for left in (255, 1023, 4095)),
    "softcap": (*(_llama(max(1, 16384 // S), S, softcap=50.0) for S in (2048, 8192)), _llama(2, 8192, softcap=30.0, window=(4095, -1))),
    "head-sizes": (
        *(Case(2, 4096, 4096, 32, 8, D, causal=True, D_v=D_v) for D, D_v in ((64, None), (96, None), (128, None), (192, 128), (192, None))),
        Case(2, 4096, 4096, 16, 4, 256, causal=True),
    ),
    # Fewer tiles than SMs. torch's cuDNN has no causal rectangle: the full one stands beside it, whose FLOPs are at most 3 % more
    "small-grids": tuple(
        Case(1, S, S_kv, *heads, 128, causal=causal)
        for heads in SMALL_HEADS
        for S in SMALL
        for S_kv, causal in ((S, True), (SMALL_KEYS, True), (SMALL_KEYS, False))
    ),
    # The backward where there is little to share: one short sequence, few heads
    "small-training": tuple(
        Case(1, S, S, *heads, 128, causal=causal) for heads in SMALL_HEADS for causal in (True, False) for S in SMALL_TRAINING
    ),
    # Of window and softcap what a backward is measured on: Flex compiles each shape for ten seconds
    "masked-training": (
        *(_llama(16384 // S, S, window=(left, -1)) for S, left in ((4096, 255), (4096, 1023), (16384, 1023), (16384, 4095))),
        *(_llama(16384 // S, S, softcap=50.0) for S in (2048, 8192)),
    ),
    # Only these are for the operation decode
    "decode-peers": _DECODE_PEERS,
    "decode-models": _DECODE_MODELS,
    "decode-queries": _DECODE_QUERIES,
    "decode-tiny": (_decode(1, 1, 16, 4, 2), _decode(1, 1, 1024, 32, 4)),
    # For the metrics host and graph: the device is done before the host is
    "tiny": (Case(1, 16, 16, 4, 2, 64, causal=True), Case(1, 16, 16, 4, 2, 128, causal=True), _llama(1, 128)),
}
EVERY: dict[str, tuple[Case | Pack, ...]] = {**SETS, "varlen": PACKS}
