"""Named cases, the truth and the closeness rule: what tests, benchmarks and users of this package measure against.

for case in testing.DENSE:
    q, k, v, do = testing.make(case, "cuda", seed=0)
    ours, plain, exact = (f(case, q, k, v, do) for f in (testing.ours, testing.plain, testing.exact))
    for name in ("out", "dq", "dk", "dv"):
        testing.assert_no_worse(getattr(ours, name), getattr(plain, name), getattr(exact, name), name, softcap=case.softcap > 0)
    testing.assert_lse(ours.lse, exact.lse)
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, functional, meta
from .reference import attention as reference

_SHORT = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}
_OPERATORS = ("fwd", "fwd_lse", "bwd", "varlen_fwd", "varlen_fwd_lse", "varlen_bwd", "decode_fwd", "decode_fwd_lse")
_ALLOCATORS = tuple(f"attention_{name}" for name in _OPERATORS)
# Float64 scores of one chunk of heads and the temporaries made of them stay below this
_CHUNK_BYTES = 3 * 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of dense attention. `str(case)` is the test id; only what differs from the default is in it."""

    B: int
    S_q: int
    S_kv: int
    H_q: int
    H_kv: int
    D: int
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    dtype: torch.dtype = torch.bfloat16
    # bshd: contiguous. bhsd: a permuted view of [B, H, S, D]. fused: views of one [B, S, (H_q + 2 H_kv) D], needs S_q == S_kv
    layout: str = "bshd"
    D_v: int | None = None

    def __str__(self) -> str:
        parts = [_SHORT[self.dtype], f"B{self.B}", f"q{self.S_q}", f"kv{self.S_kv}", f"h{self.H_q}x{self.H_kv}", f"d{self.D}"]
        parts += [f"dv{self.D_v}"] * (self.D_v is not None) + ["causal"] * self.causal
        parts += ["w{}_{}".format(*self.window)] * (self.window != (-1, -1)) + [f"cap{self.softcap:g}"] * (self.softcap > 0)
        parts += [f"scale{self.scale}"] * (self.scale is not None) + [self.layout] * (self.layout != "bshd")
        return "-".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `gqa_autograd.attention`."""
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.scale}

    @property
    def formula(self) -> tuple[int, int, float, float]:
        """window_left, window_right, scale, softcap: the last arguments of the functions in `reference.attention`."""
        scale = self.D**-0.5 if self.scale is None else self.scale
        return *checks.window("Case", self.causal, self.window), scale, self.softcap


_F16 = torch.float16
# Odd lengths around the tile sizes, both orders of S_q and S_kv, rows that see no key, every group size; sizes of a case are distinct
DENSE = (
    Case(2, 1, 1, 4, 4, 64),
    Case(1, 1, 239, 8, 2, 128, causal=True),
    Case(3, 2, 5, 4, 1, 64, causal=True, dtype=_F16),
    Case(2, 64, 128, 6, 2, 64),
    Case(1, 113, 203, 6, 3, 128, causal=True),
    Case(2, 127, 127, 4, 4, 128, causal=True, layout="bhsd"),
    Case(1, 128, 217, 8, 1, 128, dtype=_F16),
    Case(2, 250, 250, 6, 2, 64, causal=True, layout="fused"),
    Case(1, 257, 257, 3, 3, 128, dtype=_F16, layout="fused"),
    Case(1, 129, 64, 8, 2, 128, causal=True),
    Case(1, 203, 3, 4, 1, 64, causal=True, dtype=_F16, layout="bhsd"),
    Case(1, 3, 401, 8, 1, 256, causal=True),
    Case(1, 131, 193, 4, 2, 256, causal=True, dtype=_F16),
    Case(1, 191, 97, 3, 1, 256),
    Case(1, 255, 320, 4, 1, 64, causal=True, window=(63, -1)),
    Case(1, 192, 192, 6, 2, 128, window=(17, 5), layout="bhsd"),
    Case(2, 130, 70, 4, 4, 64, window=(11, 0), dtype=_F16),
    Case(1, 67, 131, 8, 2, 128, window=(0, 0)),
    Case(1, 90, 150, 6, 1, 64, window=(-1, 31), dtype=_F16, layout="bhsd"),
    Case(1, 145, 145, 8, 2, 128, causal=True, softcap=50.0, layout="fused"),
    Case(2, 77, 139, 4, 1, 64, causal=True, softcap=15.0, dtype=_F16),
    Case(1, 101, 162, 6, 2, 128, causal=True, scale=-0.3),
    Case(1, 99, 111, 4, 4, 64, scale=0.0),
    Case(1, 83, 175, 8, 1, 64, causal=True, scale=1.0, dtype=_F16),
    Case(2, 0, 37, 6, 2, 64, causal=True),
    Case(2, 41, 0, 6, 3, 64, dtype=_F16),
    Case(0, 19, 23, 4, 2, 128, causal=True),
)


class Result(NamedTuple):
    """What one implementation says about one case."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def make(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, each a leaf that requires a gradient, and do; standard normal numbers in the layout of the case."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)

    def tensor(S: int, H: int, D: int) -> Tensor:
        return normal(case.B, H, S, D).transpose(1, 2) if case.layout == "bhsd" else normal(case.B, S, H, D)

    D_v = case.D if case.D_v is None else case.D_v
    if case.layout == "fused":
        widths = [case.H_q * case.D, case.H_kv * case.D, case.H_kv * D_v]
        parts = normal(case.B, case.S_q, sum(widths)).split(widths, dim=-1)
        q, k, v = (part.unflatten(-1, (H, -1)) for part, H in zip(parts, (case.H_q, case.H_kv, case.H_kv), strict=True))
    else:
        q, k, v = tensor(case.S_q, case.H_q, case.D), tensor(case.S_kv, case.H_kv, case.D), tensor(case.S_kv, case.H_kv, D_v)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), tensor(case.S_q, case.H_q, D_v)


def ours(
    case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor | None = None, *, deterministic: bool | None = None
) -> Result:
    """The public function of this package, differentiated by autograd."""
    out, lse = functional.attention_with_lse(q, k, v, **case.options, deterministic=deterministic)
    outputs = ((out, do),) if dlse is None else ((out, do), (lse, dlse))
    grads = torch.autograd.grad([o for o, _ in outputs], (q, k, v), [g for _, g in outputs])
    return Result(out.detach(), lse.detach(), *grads)


@torch.no_grad()
def exact(case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor | None = None) -> Result:
    """The truth: the definition and its written-out gradient in float64, a few heads at a time so that long cases fit."""
    result = _empty(q, k, v, torch.float64)
    for name in ("dk", "dv"):
        getattr(result, name).zero_()
    # About seven matrices of the size of the scores live at once
    heads = max(1, _CHUNK_BYTES // (7 * 8 * max(1, q.shape[1] * k.shape[1])))
    for b, h, group in _groups(q, k):
        for first in range(group.start, group.stop, heads):
            mine, theirs = (b, slice(None), slice(first, min(first + heads, group.stop))), (b, slice(None), h)
            rows = (b, mine[2])
            q_, k_, v_, do_ = q[mine].double(), k[theirs].double(), v[theirs].double(), do[mine].double()
            result.out[mine], result.lse[rows] = out, lse = reference.attention_fwd_lse(q_, k_, v_, *case.formula)
            d = None if dlse is None else dlse[rows].double()
            result.dq[mine], dk, dv = reference.attention_bwd(do_, q_, k_, v_, out, lse, d, *case.formula)
            result.dk[theirs] += dk
            result.dv[theirs] += dv
    return result


def plain(case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor | None = None) -> Result:
    """The same formula as one would write it in PyTorch: every step in the dtype of q, gradients by autograd."""
    result = _empty(q, k, v, q.dtype)
    for b, h, group in _groups(q, k):
        mine, theirs, rows = (b, slice(None), group), (b, slice(None), h), (b, group)
        inputs = [t.detach().requires_grad_() for t in (q[mine], k[theirs], v[theirs])]
        with torch.enable_grad():
            out, lse = _plain_forward(inputs, *case.formula)
        result.out[mine], result.lse[rows] = out.detach(), lse.detach()
        outputs, grads = ([out], [do[mine]]) if dlse is None else ([out, lse], [do[mine], dlse[rows].to(lse.dtype)])
        result.dq[mine], result.dk[theirs], result.dv[theirs] = torch.autograd.grad(outputs, inputs, grads)
    return result


def _plain_forward(qkv: list[Tensor], left: int, right: int, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    q, k, v = (t.transpose(1, 2) for t in qkv)
    z = q @ k.transpose(2, 3) * scale
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    seen = reference.visible(q.shape[2], k.shape[2], left, right, q.device)
    blind = ~seen.any(1, keepdim=True)
    # A row that sees no key is left unmasked and cleared afterwards: a softmax over -inf alone would be NaN, in the gradient too
    z = z.masked_fill(~(seen | blind), -math.inf)
    p = torch.softmax(z, dim=-1).masked_fill(blind, 0)
    return (p @ v).transpose(1, 2), torch.logsumexp(z, dim=-1).masked_fill(blind.squeeze(1), -math.inf)


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(batch, KV head, its query heads), one at a time, as slices."""
    G = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(k.shape[2]):
            yield slice(b, b + 1), slice(h, h + 1), slice(h * G, (h + 1) * G)


def _empty(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Result:
    """Contiguous outputs in one dtype."""
    outputs = *meta.attention_fwd_lse(q, k, v), *meta.attention_bwd(q, k, v)
    return Result(*(torch.empty(t.shape, dtype=dtype, device=q.device) for t in outputs))


def assert_no_worse(
    ours: Tensor, plain: Tensor, exact: Tensor, name: str, softcap: bool = False, gradient: bool = False, rounding: Tensor | None = None
) -> None:
    """max|ours - exact| <= 2 max|plain - exact| + atol,  mean|ours - exact| <= 1.5 mean|plain - exact|

    atol = 2 max|(exact + 0.3 - 0.3) - exact| in the dtype of ours; 3 instead of 2 with softcap, and of a gradient 3e-4 more. Anything not
    finite fails. A result that vanishes by cancellation (one visible key, so dz = 0 and dq = 0) is met exactly by plain and cannot be by
    float32 sums: there, and only there, 2^-16 is allowed, or element by element `rounding`, which `vanishing` derives.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert bool(torch.isfinite(ours).all()), f"{name}: {int((~torch.isfinite(ours)).sum())} of {ours.numel()} elements are not finite"
    if ours.numel() == 0:
        return
    error, allowed = (ours.double() - exact).abs(), (plain.double() - exact).abs()
    worst, mean = error.max().item(), error.mean().item()
    if rounding is not None or (ours.dtype is not torch.float64 and exact.abs().max().item() < 2**-40):
        excess = int((error > (2**-16 if rounding is None else rounding)).sum())
        assert excess == 0, f"{name}: max error {worst:.3e} where the exact result is zero, {excess} elements off"
        return
    low, shift = exact.to(ours.dtype), torch.tensor(0.3, dtype=ours.dtype, device=ours.device)
    atol = 2 * ((low + shift - shift) - low).abs().max().item() + (3e-4 if softcap and gradient else 0)
    limit = (3 if softcap else 2) * allowed.max().item() + atol
    assert worst <= limit, f"{name}: max error {worst:.3e} > {limit:.3e} (plain {allowed.max().item():.3e}, atol {atol:.3e})"
    limit = 1.5 * allowed.mean().item()
    assert mean <= limit, f"{name}: mean error {mean:.3e} > {limit:.3e}"


@torch.no_grad()
def vanishing(case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor | None = None) -> dict[str, Tensor]:
    """What float32 sums may leave of dq and dk where both are exactly zero: because scale is 0, or every query sees one key at most and lse
    has no gradient. By name, for `assert_no_worse`; empty for every other case.

    With one key P is 1, and dz = do·v - do·out is the difference of two float32 sums of the same D_v products x, in different orders. An
    addition rounds by at most 2^-24 of the partial sum (2^-23 where tensor cores cut off); partial sums of numbers of any sign grow to the
    norm of x; D_v such roundings add up as their root. So 2^-24 sqrt(D_v) |x| is one standard deviation of a dz at most. dq = scale dz k
    has one such summand. In dk the errors of a key's rows meet, times queries of any sign: the root of the sum of their squares. Eight
    standard deviations bound a million elements also where all rows share one error (`do` expanded): a product of two normal numbers.
    The default scale leaves about 2^-16 of one row; it grows with scale, with D_v and with the rows of a key."""
    left, right, scale, _ = case.formula
    seen = reference.visible(q.shape[1], k.shape[1], left, right, q.device)
    if seen.numel() == 0:
        return {}
    if scale != 0 and (dlse is not None or int(seen.sum(1).max()) > 1):
        return {}
    dq, squares = (torch.zeros(t.shape, dtype=torch.float64, device=q.device) for t in (q, k))
    for b, h, group in _groups(q, k):
        mine, theirs = (b, slice(None), group), (b, slice(None), h)
        q_, do_ = (t[mine][0].double().transpose(0, 1) for t in (q, do))  # [G, S_q, D]
        k_, v_ = (t[theirs][0, :, 0].double() for t in (k, v))  # [S_kv, D]
        dz = 8 * 2**-24 * v.shape[3] ** 0.5 * (do_.square() @ v_.square().mT).sqrt() * seen
        dq[mine] = (abs(scale) * dz @ k_.abs()).transpose(0, 1)
        squares[theirs] = (scale**2 * dz.square().mT @ q_.square()).sum(0)[:, None]
    return {"dq": dq, "dk": squares.sqrt()}


def assert_gradients(case: Case, ours: Result, plain: Result, exact: Result, rounding: dict[str, Tensor], of: str = "") -> None:
    """assert_no_worse of dq, dk and dv; `rounding` is what `vanishing` says of the case."""
    for name in ("dq", "dk", "dv"):
        mine, theirs, truth = (getattr(result, name) for result in (ours, plain, exact))
        assert_no_worse(mine, theirs, truth, name + of, softcap=case.softcap > 0, gradient=True, rounding=rounding.get(name))


def assert_lse(lse: Tensor, exact: Tensor) -> None:
    """|lse - exact| <= 1e-5 max(1, |exact|); -inf exactly where exact has it."""
    assert lse.shape == exact.shape, f"lse: shape {tuple(lse.shape)}, expected {tuple(exact.shape)}"
    assert lse.dtype in (torch.float32, torch.float64), f"lse: dtype {lse.dtype}"
    blind = exact == -math.inf
    assert torch.equal(lse == -math.inf, blind), "lse: -inf where a key is visible, or a number where none is"
    error = (lse.double() - exact).masked_fill(blind, 0).abs()
    # NaN compares false
    within = error <= 1e-5 * exact.abs().clamp(min=1)
    assert bool((within | blind).all()), f"lse: error {error.max().item():.3e}, {int((~within & ~blind).sum())} elements off or not finite"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every output of every operator starts as NaN, so that an element which no kernel wrote is seen."""

    def poison(name: str, outputs: tuple[Tensor, ...]) -> None:
        for t in outputs:
            t.fill_(math.nan)

    with _allocations(poison):
        yield


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """The operator bodies that ran, by name, in order: ["attention_fwd_lse", "attention_bwd"].

    A body starts by asking `meta` for its outputs. It does so in eager, inside what Inductor compiled and in a loaded graph, while a fake
    kernel asks with fake tensors, which are not counted.
    """
    calls: list[str] = []
    with _allocations(lambda name, outputs: calls.append(name)):
        yield calls


@contextlib.contextmanager
def _allocations(seen: Callable[[str, tuple[Tensor, ...]], None]) -> Iterator[None]:
    """Calls seen(operator, outputs) whenever the body of an operator allocates."""
    originals = {name: getattr(meta, name) for name in _ALLOCATORS}
    inside: list[str] = []

    def wrap(name: str) -> Callable:
        def allocate(*args):
            inside.append(name)
            try:
                outputs = originals[name](*args)
            finally:
                inside.pop()
            # An allocator may call another: only the outermost is a body
            real = not isinstance(args[0], torch._subclasses.FakeTensor) and not args[0].is_meta
            if real and not inside:
                seen(name, (outputs,) if isinstance(outputs, Tensor) else outputs)
            return outputs

        return allocate

    try:
        for name in _ALLOCATORS:
            setattr(meta, name, wrap(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(meta, name, original)
