"""Which configurations have a kernel, and their tiles: plain data, readable without tilelang. Tuned on an H200; no autotuning at run time.

One kernel per configuration: dtype, D, causal or full, with LSE or without. Lengths, heads, strides and scale are run-time values, and no
tile depends on a length, so a row of a batch has the same bits alone and in company."""

from typing import NamedTuple


class Forward(NamedTuple):
    """Tile of the forward kernel: block_M queries (64 a consumer warpgroup) by block_N keys, K and V in a ring of `stages` buffers.
    own_staging: the output leaves from shared memory of its own; without, from Q's, whose next load then waits for the store.
    skip_rescale: leave the output as it is where no maximum moved: the same bits, faster; at D 256 it would spill registers."""

    D: int
    causal: bool
    block_M: int
    block_N: int
    stages: int
    own_staging: bool
    skip_rescale: bool


class Backward(NamedTuple):
    """Tile of the backward kernel: block_N keys stay, block_M queries pass through rings of `stages` buffers."""

    D: int
    causal: bool
    block_M: int
    block_N: int
    stages: int


FORWARD = {
    (64, True): Forward(64, True, 128, 128, 2, True, True),
    (64, False): Forward(64, False, 128, 128, 2, True, True),
    (128, True): Forward(128, True, 128, 128, 2, True, True),
    (128, False): Forward(128, False, 128, 160, 2, True, True),
    (256, True): Forward(256, True, 128, 80, 2, False, False),
    (256, False): Forward(256, False, 128, 80, 2, False, False),
}
BACKWARD = {
    (64, True): Backward(64, True, 64, 128, 2),
    (64, False): Backward(64, False, 64, 128, 2),
    (128, True): Backward(128, True, 64, 128, 2),
    (128, False): Backward(128, False, 64, 128, 2),
}
D_FORWARD = tuple(sorted({D for D, _ in FORWARD}))
D_BACKWARD = tuple(sorted({D for D, _ in BACKWARD}))


def _causal(function: str, window_left: int, window_right: int, softcap: float) -> bool:
    """True for causal, False for full; no other mask has a kernel yet."""
    if softcap != 0:
        raise NotImplementedError(f"{function}: softcap on CUDA must be 0 (off), no kernel has it yet, got {softcap}")
    if window_left != -1 or window_right not in (-1, 0):
        raise NotImplementedError(
            f"{function}: window on CUDA must be (-1, -1), or (-1, 0) as causal makes it, no kernel has another yet, "
            f"got {(window_left, window_right)}"
        )
    return window_right == 0


def forward(function: str, D: int, D_v: int, window_left: int, window_right: int, softcap: float) -> Forward:
    """The tile of a forward; NotImplementedError names what there is."""
    causal = _causal(function, window_left, window_right, softcap)
    # While tracing a size may be symbolic; a kernel's head size is a constant of the graph
    D, D_v = int(D), int(D_v)
    if D not in D_FORWARD or D_v != D:
        raise NotImplementedError(f"{function}: D on CUDA must be one of {D_FORWARD} and D_v equal to it, got D={D}, D_v={D_v}")
    return FORWARD[D, causal]


def backward(function: str, D: int, D_v: int, window_left: int, window_right: int, softcap: float, deterministic: bool) -> Backward:
    """The tile of a backward; NotImplementedError names what there is."""
    causal = _causal(function, window_left, window_right, softcap)
    D, D_v = int(D), int(D_v)
    if D not in D_BACKWARD or D_v != D:
        raise NotImplementedError(
            f"{function}: D for gradients on CUDA must be one of {D_BACKWARD} and D_v equal to it, got D={D}, D_v={D_v}; "
            "the forward alone runs under torch.no_grad()"
        )
    if deterministic:
        raise NotImplementedError(f"{function}: deterministic must be False for gradients on CUDA, dq is summed by atomics, got True")
    return BACKWARD[D, causal]
