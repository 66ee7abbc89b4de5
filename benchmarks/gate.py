"""What must hold before a time is taken: ours passes the closeness rule on a short twin, and the contestants compute the same."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import gqa_autograd
from gqa_autograd import testing, testing_decode, testing_varlen
from gqa_autograd.testing import Case
from gqa_autograd.testing_decode import DecodeCase

from .baselines import Contestant
from .packs import Pack

# Of bf16 results over standard normal inputs; another mask or layout gives 10 % and more
AGREEMENT = 0.03
SHORT = 777
# By name: out, or dq, dk and dv
Results = dict[str, Tensor]


def error_ratio(case: Case | Pack, op: str) -> float:
    """The worst tensor's error over plain PyTorch's on a short twin of the case, which must pass the closeness rule."""
    softcap = isinstance(case, Case) and case.softcap > 0
    if isinstance(case, Case) and op == "decode":
        mine, plain, exact = _decoded(case)
    else:
        mine, plain, exact = _packed(case.twin, op) if isinstance(case, Pack) else _dense(case, op)
    for name in mine:
        testing.assert_no_worse(mine[name], plain[name], exact[name], name, softcap=softcap, gradient=op == "backward")
    error = lambda x, name: (x[name].double() - exact[name]).abs().max()  # noqa: E731
    return max((error(mine, name) / error(plain, name)).item() for name in mine)


def _dense(case: Case, op: str) -> tuple[Results, Results, Results]:
    """Ours, plain and exact."""
    # Few queries keep all their keys: there the work may be split, as on short rows it is not
    S_kv = case.S_kv if case.S_q <= SHORT else min(case.S_kv, SHORT)
    twin = dataclasses.replace(case, B=1, S_q=min(case.S_q, SHORT), S_kv=S_kv)
    tensors = testing.make(twin, "cuda")
    with testing.poisoned():
        if op == "forward":
            with torch.no_grad():
                mine = {"out": gqa_autograd.attention(*tensors[:3], **twin.options)}
        else:
            found = testing.ours(twin, *tensors)._asdict()
            mine = {name: found[name] for name in ("dq", "dk", "dv")}
    return mine, testing.plain(twin, *tensors)._asdict(), testing.exact(twin, *tensors)._asdict()


def _decoded(case: Case) -> tuple[Results, Results, Results]:
    """Two sequences of other lengths, the longer one enough for several thread blocks to share its keys."""
    longest = min(case.S_kv, 10 * SHORT)
    twin = DecodeCase(case.S_q, (longest, max(1, longest // 3)), case.H_q, case.H_kv, case.D, dtype=case.dtype)
    given = testing_decode.make(twin, "cuda")
    with testing.poisoned():
        mine = gqa_autograd.attention_decode(*given.arguments, **given.options)
    return {"out": mine}, {"out": testing_decode.plain(given)}, {"out": testing_decode.exact(given)[0]}


def _packed(twin: Pack, op: str) -> tuple[Results, Results, Results]:
    args = testing_varlen.make(twin.case, "cuda")
    q, k, v, _, *cu_seqlens = args
    names = ("out",) if op == "forward" else ("dq", "dk", "dv")
    with testing.poisoned():
        if op == "forward":
            with torch.no_grad():
                mine = {"out": gqa_autograd.attention_varlen(q, k, v, *cu_seqlens, **twin.options)}
        else:
            mine = testing_varlen.ours(twin.case, *args)._asdict()
    plain, exact = (f(twin.case, *args)._asdict() for f in (testing_varlen.plain, testing_varlen.exact))
    return tuple({name: found[name] for name in names} for found in (mine, plain, exact))  # type: ignore[return-value]


def results(contestant: Contestant, op: str) -> tuple[Tensor, ...]:
    """out, or dq, dk and dv, as [B, S, H, D] or packed."""
    if op != "backward":
        outputs: tuple[Tensor, ...] = (contestant.forward(),)
    else:
        assert contestant.backward is not None
        outputs = contestant.backward()
    return tuple(t.transpose(1, 2) if contestant.bhsd else t for t in outputs)


def agreeing(contestants: dict[str, Contestant], op: str, say: Callable[[str], None]) -> dict[str, Contestant]:
    """Those whose results are the first one's: the same mask, scale and layout. Ours is first where it has a kernel.

    Who computes something else by intent can't be compared here; its own case has passed the closeness rule."""
    expected: tuple[Tensor, ...] | None = None
    found = {}
    for name, contestant in contestants.items():
        if contestant.instead is not None:
            found[name] = contestant
            continue
        mine = results(contestant, op)
        expected = mine if expected is None else expected
        distance = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(mine, expected, strict=True))
        # NaN is no agreement
        if distance <= AGREEMENT:
            found[name] = contestant
        else:
            say(f"{name}: no row: its {op} is {distance:.1%} away from that of {next(iter(contestants))}")
    return found
