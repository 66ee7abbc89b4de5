"""Caches of keys and values for generation: storage and lengths on the device, who has which rows on the host.

A step appends and attends without the host waiting for the device, so it can be compiled and captured in a CUDA graph. What a layer takes
is `cache.layer(i)`, or the cache itself if it has one layer. Lengths are shared by all layers and move on in the last one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops_cache
from .checks_decode import PAGE_SIZES
from .pages import PagePool


class CacheLayer:
    """One layer's keys and values: `kv_cache` of GQAttention.

    k_cache, v_cache: [B, S_max, H_kv, D], or with page_table int32 [B, entries] pages [P, S_page, H_kv, D]. lengths: int32 [B], the tokens
    of each sequence before this step."""

    def __init__(self, cache: "_Cache", k_cache: Tensor, v_cache: Tensor, last: bool) -> None:
        self.k_cache, self.v_cache = k_cache, v_cache
        self.lengths, self.page_table = cache.lengths, cache.page_table
        self._cache, self._last = cache, last

    @property
    def empty(self) -> bool:
        """Does the host know that no sequence has a token? What a replayed CUDA graph appends, it does not see."""
        host = self._cache._host
        return not host.unseen and not any(host.used[b] for b in self._cache._rows)

    def assert_empty(self) -> None:
        """Asks the device, without waiting, whether the host is right that there are no tokens.

        Raises: RuntimeError on a CPU; on CUDA an assertion of the device, after which no call succeeds: better than results without the
            tokens that a replayed graph has appended since a reset."""
        message = "GQAttention: kv_cache has tokens that the host does not know of; reset it before the prompt"
        torch._assert_async(~self.lengths.any(), message)

    def positions(self, S: int) -> Tensor:
        """The positions [B, S] of the S next tokens."""
        return self.lengths[:, None] + torch.arange(S, dtype=torch.int32, device=self.lengths.device)

    def append(self, k_new: Tensor, v_new: Tensor) -> Tensor:
        """Writes k_new and v_new [B, S, H_kv, D] behind each sequence's tokens, in place.

        Returns: the lengths [B] with the new tokens, as `attention_decode` wants them. In the last layer they become the cache's own.
        Raises: ValueError for a shape, or where the host knows that there is no room, TypeError for a dtype, RuntimeError for a tensor that
            requires a gradient. Then nothing was written. Where only the device knows, tokens without room are dropped there."""
        cache = self._cache
        S = k_new.shape[1]
        if not torch.compiler.is_compiling():
            cache._check_room(S)
        ops_cache.cache_append_(self.k_cache, self.v_cache, k_new, v_new, self.lengths, self.page_table)
        ends = self.lengths + (S if cache._active is None else S * cache._active)
        if self._last:
            self.lengths.copy_(ends)
            if torch.compiler.is_compiling():
                cache._host.unseen = True
            else:
                cache._note(S)
        return ends


class _Host:
    """What the host knows of each sequence, shared by all views: has it a token, and how many at least? A compiled step, which must not
    depend on that, only notes that there was one."""

    def __init__(self, batch: int) -> None:
        self.used, self.least, self.unseen = [False] * batch, [0] * batch, False

    def set(self, b: int, tokens: int) -> None:
        if self.unseen:
            self.used, self.unseen = [True] * len(self.used), False
        self.used[b], self.least[b] = tokens > 0, tokens


class _Cache:
    """What both caches have: their layers, and room that the host can check."""

    page_table: Tensor | None = None
    # 1 for a place in the batch that is in use; None where all are
    _active: Tensor | None = None
    _host: _Host

    def _settle(self, k: Sequence[Tensor], v: Sequence[Tensor], lengths: Tensor, rows: range) -> None:
        self.k, self.v, self.lengths, self._rows = tuple(k), tuple(v), lengths, rows
        last = len(self.k) - 1
        self._layers = tuple(CacheLayer(self, *pair, i == last) for i, pair in enumerate(zip(k, v, strict=True)))

    @property
    def layers(self) -> int:
        return len(self.k)

    def layer(self, i: int = 0) -> CacheLayer:
        """What the attention of layer i takes as kv_cache."""
        return self._layers[i]

    def _in_use(self) -> list[int]:
        return list(self._rows)

    def _room(self, b: int) -> int:
        raise NotImplementedError

    def _check_room(self, S: int) -> None:
        for b in self._in_use():
            least, room = self._host.least[b], self._room(b)
            if least + S > room:
                name = type(self).__name__
                raise ValueError(f"{name}: sequence {b} must have room for the new tokens, got {least} + {S} tokens for {room} rows")

    def _note(self, S: int) -> None:
        for b in self._in_use():
            self._host.used[b] |= S > 0
            self._host.least[b] += S


class KVCache(_Cache):
    """A cache with max_length rows for each of `batch` sequences

    Args:
        batch, max_length, num_kv_heads, head_dim: B, S_max, H_kv, D.
        layers: how many layers share the lengths; `layer(i)` goes to the i-th, in the order in which they run: the last one moves on.
        dtype, device: of keys and values: what the projections return, bfloat16 under autocast to it.
    Attributes: k, v: for each layer [B, S_max, H_kv, D]; lengths: int32 [B], on the device.
    Raises: ValueError for a size, TypeError for a type. See `CacheLayer.append` for what an append refuses.
    """

    def __init__(
        self,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layers: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        _sizes("KVCache", batch=batch, max_length=max_length, num_kv_heads=num_kv_heads, head_dim=head_dim, layers=layers)
        self.max_length = max_length
        self._host = _Host(batch)
        pairs = _storage((batch, max_length, num_kv_heads, head_dim), layers, dtype, device)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        _keep_addresses(lengths)
        self._settle(*pairs, lengths, range(batch))

    def reset(self) -> None:
        """No sequence has a token. Nothing is written but the lengths; a graph that was captured with this cache stays right."""
        self.lengths.zero_()
        for b in self._rows:
            self._host.set(b, 0)

    def crop(self, lengths: int | Tensor) -> None:
        """Each sequence keeps its first tokens, `lengths` at most: an int, or int32 [B] on the device, which the host does not look at.

        After a prefill of prompts that were padded on the right: crop to their true lengths, and the next tokens overwrite the padding.
        Raises: TypeError or ValueError for anything else."""
        if isinstance(lengths, Tensor):
            if lengths.dtype is not torch.int32:
                raise TypeError(f"KVCache: lengths must be int32, got {str(lengths.dtype).removeprefix('torch.')}")
            if lengths.shape != self.lengths.shape or lengths.device != self.lengths.device:
                want = f"[{len(self._rows)}] on {self.lengths.device}"
                raise ValueError(f"KVCache: lengths must be {want}, got shape {tuple(lengths.shape)} on {lengths.device}")
            self.lengths.copy_(torch.minimum(self.lengths, lengths.clamp(min=0)))
        else:
            if not isinstance(lengths, int) or isinstance(lengths, bool):
                raise TypeError(f"KVCache: lengths must be an int or a tensor, got {lengths!r}")
            if lengths < 0:
                raise ValueError(f"KVCache: lengths must be at least 0, got {lengths}")
            self.lengths.clamp_(max=lengths)
        for b in self._rows:
            self._host.least[b] = min(self._host.least[b], lengths) if isinstance(lengths, int) else 0

    def row(self, b: int) -> "KVCache":
        """Sequence b alone, as a cache of batch 1 on the same memory: for a prefill of one prompt."""
        _index("KVCache", b, len(self._rows))
        view = KVCache.__new__(KVCache)
        view.max_length, view._host = self.max_length, self._host
        one = slice(b, b + 1)
        view._settle([t[one] for t in self.k], [t[one] for t in self.v], self.lengths[one], range(self._rows[b], self._rows[b] + 1))
        return view

    def _room(self, b: int) -> int:
        return self.max_length


class PagedKVCache(_Cache):
    """A cache whose sequences take pages from one pool, and share those with which they begin alike

    `add` gives a sequence a place in the batch and pages for its tokens; `row(sequence)` takes its prefill, the cache itself a step of all
    sequences, with one row of x for each place; those not in use get 0 and write nothing. The host decides about pages and never looks at
    the device: page_table and lengths are copied there in stream order, also between replays of a captured step.

    Args:
        num_pages, page_size: P and S_page, 16, 32, 64, 128 or 256, which a sequence's room is a multiple of.
        num_kv_heads, head_dim: H_kv, D.
        batch: how many sequences there can be at a time. max_pages: how many pages one can have; num_pages when None.
        layers, dtype, device: as for KVCache.
    Attributes: k, v: for each layer [P, S_page, H_kv, D]; page_table: int32 [batch, max_pages], -1 for no page; lengths: int32 [batch].
    Raises: ValueError for a size, TypeError for a type.
    """

    page_table: Tensor
    _active: Tensor

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        batch: int,
        max_pages: int | None = None,
        layers: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        max_pages = num_pages if max_pages is None else max_pages
        _sizes("PagedKVCache", num_pages=num_pages, num_kv_heads=num_kv_heads, head_dim=head_dim)
        _sizes("PagedKVCache", batch=batch, max_pages=max_pages, layers=layers)
        if page_size not in PAGE_SIZES:
            raise ValueError(f"PagedKVCache: page_size must be one of {PAGE_SIZES}, got {page_size!r}")
        self.pool = PagePool(num_pages, page_size)
        self._pages: list[list[int] | None] = [None] * batch
        self._prompts: list[tuple[int, ...]] = [()] * batch
        self._host = _Host(batch)
        pairs = _storage((num_pages, page_size, num_kv_heads, head_dim), layers, dtype, device)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.page_table = torch.full((batch, max_pages), -1, dtype=torch.int32, device=device)
        self._active = torch.zeros_like(lengths)
        _keep_addresses(lengths, self.page_table, self._active)
        self._settle(*pairs, lengths, range(batch))

    def add(self, tokens: Sequence[int], room: int = 0) -> tuple[int, int]:
        """A new sequence that begins with tokens, with pages for these and `room` more.

        Returns: (sequence, cached): its place in the batch, and how many of its first tokens stand in pages that others have `share`d.
            They are its own now, nothing was copied; feed the rest, tokens[cached:], which is at least one token.
        Raises: ValueError for no tokens or a number, RuntimeError if there is no place, too few pages left or too many needed; then
            nothing has changed."""
        tokens = tuple(int(token) for token in tokens)
        if not tokens or not isinstance(room, int) or room < 0:
            raise ValueError(f"PagedKVCache: add needs at least one token and room of at least 0, got {len(tokens)} tokens, room {room!r}")
        if None not in self._pages:
            raise RuntimeError(f"PagedKVCache: all {len(self._pages)} places in the batch are in use; free a sequence first")
        known = self.pool.match(tokens)
        pages = self._take(known, self._needed(len(tokens) + room), 0)
        sequence, cached = self._pages.index(None), len(known) * self.pool.page_size
        self._pages[sequence], self._prompts[sequence] = pages, tokens
        self._host.set(sequence, cached)
        self._write_table(sequence, 0)
        self.lengths[sequence].fill_(cached)
        self._active[sequence].fill_(1)
        return sequence, cached

    def grow(self, sequence: int, room: int) -> None:
        """Pages for `room` tokens in all, if the sequence has fewer.

        Raises: KeyError for no sequence, RuntimeError as `add`."""
        pages = self._of(sequence, "grow")
        count = self._needed(room) - len(pages)
        if count > 0:
            first = len(pages)
            pages += self._take([], count, first)
            self._write_table(sequence, first)

    def share(self, sequence: int, tokens: Sequence[int] | None = None) -> None:
        """Lets later `add`s take this sequence's full pages. Call it when the appends of tokens, or of those it was added with, have been
        launched; the host can't know. The pages outlive the sequence until their place is needed.

        Raises: KeyError for no sequence, ValueError if tokens don't begin with those that it was added with, or don't fit."""
        pages, prompt = self._of(sequence, "share"), self._prompts[sequence]
        tokens = prompt if tokens is None else tuple(int(token) for token in tokens)
        if tokens[: len(prompt)] != prompt or len(tokens) > len(pages) * self.pool.page_size:
            raise ValueError(
                f"PagedKVCache: share needs the {len(prompt)} tokens of sequence {sequence} and those after them, in at most "
                f"{len(pages) * self.pool.page_size} rows, got {len(tokens)} tokens"
            )
        self.pool.share(pages, tokens)

    def free(self, sequence: int) -> None:
        """The sequence's place and pages are free again; pages that others use stay theirs.

        Raises: KeyError for no sequence."""
        pages = self._of(sequence, "free")
        self._pages[sequence] = None
        self._host.set(sequence, 0)
        self.page_table[sequence].fill_(-1)
        self.lengths[sequence].zero_()
        self._active[sequence].zero_()
        self.pool.release(pages)

    def reset(self) -> None:
        """Frees every sequence."""
        for sequence, pages in enumerate(self._pages):
            if pages is not None:
                self.free(sequence)

    def row(self, sequence: int) -> "PagedKVCache":
        """That sequence alone, as a cache of batch 1 on the same memory: for its prefill. The view itself takes no `add`.

        Raises: KeyError for no sequence."""
        self._of(sequence, "row")
        view = PagedKVCache.__new__(PagedKVCache)
        one = slice(sequence, sequence + 1)
        view.pool, view._pages, view._prompts, view._host = self.pool, self._pages, self._prompts, self._host
        view.page_table, view._active = self.page_table[one], self._active[one]
        view._settle(self.k, self.v, self.lengths[one], range(sequence, sequence + 1))
        return view

    def _of(self, sequence: int, what: str) -> list[int]:
        pages = self._pages[sequence] if type(sequence) is int and sequence in self._rows else None
        if pages is None:
            raise KeyError(f"PagedKVCache: {what} needs a sequence that was added and not freed, got {sequence!r}")
        return pages

    def _needed(self, tokens: int) -> int:
        return -(-tokens // self.pool.page_size)

    def _take(self, known: list[int], needed: int, first: int) -> list[int]:
        if first + needed > self.page_table.shape[1]:
            raise RuntimeError(f"PagedKVCache: a sequence has at most {self.page_table.shape[1]} pages, got {first + needed} needed")
        pages = self.pool.take(known, needed - len(known))
        if pages is None:
            raise RuntimeError(f"PagedKVCache: the pool is exhausted, got {needed - len(known)} pages needed, {self.pool.available} left")
        return pages

    def _write_table(self, sequence: int, first: int) -> None:
        pages = self._of(sequence, "add")[first:]
        # From pageable memory: CUDA takes its own copy at once, so the host waits for nothing and the list may go
        row = torch.tensor(pages, dtype=torch.int32)
        self.page_table[sequence, first : first + len(pages)].copy_(row, non_blocking=True)

    def _in_use(self) -> list[int]:
        return [b for b in self._rows if self._pages[b] is not None]

    def _room(self, b: int) -> int:
        return len(self._pages[b] or ()) * self.pool.page_size


def _storage(
    shape: tuple[int, ...], layers: int, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[list[Tensor], list[Tensor]]:
    """k and v of each layer. Tensors of their own: a compiled step that writes to two views of one would copy it."""
    k, v = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in "kv")
    if not k[0].is_floating_point():
        raise TypeError(f"cache: dtype must be a floating-point type, got {str(k[0].dtype).removeprefix('torch.')}")
    _keep_addresses(*k, *v)
    return k, v


def _keep_addresses(*tensors: Tensor) -> None:
    """Tells torch.compile's own CUDA graphs that these stay where they are: else it refuses to capture what writes to them."""
    for t in tensors:
        if t.is_cuda:
            torch._dynamo.mark_static_address(t)


def _sizes(name: str, **sizes: object) -> None:
    for what, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name}: {what} must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name}: {what} must be at least 1, got {size}")


def _index(name: str, b: object, count: int) -> None:
    if not isinstance(b, int) or not 0 <= b < count:
        raise IndexError(f"{name}: row must be from 0 to {count - 1}, got {b!r}")
