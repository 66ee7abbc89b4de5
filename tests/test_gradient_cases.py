"""The cases of the GPU tests of gradients are as many and as different as the specification asks; collected without a GPU."""

import itertools
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "gpu"))
import gradient_cases as cases

from gqa_autograd.kernels import config


@pytest.mark.parametrize("covering", [cases.COVERING, cases.PACKED_COVERING], ids=["dense", "packed"])
def test_every_size_meets_every_setting(covering):
    """Faults: a size left out; cases that fall onto one id."""
    seen = {((one.case.D, one.case.D_v or one.case.D), one.case.dtype, one.dlse, one.do) for one in covering.values()}
    assert seen == set(itertools.product(config.D_BACKWARD, (cases.BF16, cases.F16), (False, True), cases.AXES["do"]))
    sizes = {(one.case.D, one.case.softcap, one.case.window, one.case.causal) for one in covering.values()}
    assert sizes >= {
        (D, softcap, mask.get("window", (-1, -1)), "causal" in mask)
        for (D, _), softcap, mask in itertools.product(config.D_BACKWARD, (0.0, 15.0), cases.MASKS.values())
    }


def test_dense_cases():
    # More than a thousand with all six sizes of the forward
    assert len(cases.COVERING) >= 170 * len(config.D_BACKWARD)
    shapes = {((one.case.S_q, one.case.S_kv), (one.case.H_q, one.case.H_kv)) for one in cases.COVERING.values()}
    assert shapes == set(itertools.product(cases.LENGTHS, cases.HEADS))
