"""`warmup` of what `attention_decode` and caches need."""

from collections.abc import Sequence

import torch

from . import checks, functional_decode, ops_cache

# Of a cache whose pages are whole boxes, and of one whose pages are smaller
_PAGES = (None, 64, 16)


def warm_decode(sizes: Sequence[int], dtypes: Sequence[torch.dtype], softcap: bool, device: torch.device | str | int | None) -> None:
    """Builds the kernels of these head sizes, and with a device launches each once there; all are found before the first is built."""
    from .kernels import cache, config, decode_launch

    for dtype in dtypes:
        if dtype not in checks.CUDA_DTYPES:
            raise TypeError(f"warmup: dtype must be float16 or bfloat16, got {str(dtype).removeprefix('torch.')}")
    tiles = [config.decode("warmup", D, S_page, float(softcap)) for D in sizes for S_page in _PAGES]
    for tile in tiles:
        for dtype in dtypes:
            decode_launch.compiled(tile, dtype)
    for dtype in dtypes:
        for paged in (False, True):
            cache.executable(dtype, paged)
    if device is not None:
        for D in sizes:
            for dtype in dtypes:
                _launch(D, dtype, float(softcap), torch.device(device))


@torch.no_grad()
def _launch(D: int, dtype: torch.dtype, softcap: float, device: torch.device) -> None:
    q = torch.zeros(1, 1, 1, D, dtype=dtype, device=device)
    lengths = torch.ones(1, dtype=torch.int32, device=device)
    for S_page in _PAGES:
        cache = q.new_zeros(1, S_page or 1, 1, D)
        table = None if S_page is None else lengths.new_zeros(1, 1)
        ops_cache.cache_append_(cache, cache.clone(), q, q, torch.zeros_like(lengths), table)
        functional_decode.attention_decode(q, cache, cache, lengths, page_table=table, softcap=softcap)
