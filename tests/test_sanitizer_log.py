"""What is read out of compute-sanitizer's report: a reader that finds nothing would pass every kernel."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("sanitizer", Path(__file__).parent / "gpu" / "sanitizer.py")
assert _spec is not None
assert _spec.loader is not None
sanitizer = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sanitizer)

CLEAN = "========= COMPUTE-SANITIZER\nsmall_step: done\n========= ERROR SUMMARY: 0 errors\n"
WRITE = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at attention_fwd_kernel+0x4d10
=========     by thread (31,0,0) in block (3,0,0)
=========     Address 0x7f0000000000 is out of bounds
=========         Host Frame: main [0x1]
=========
small_step: done
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel(int)+0x60
=========
========= ERROR SUMMARY: 2 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at attention_fwd_kernel+0x90
=========     and Read access at attention_fwd_kernel+0x120 [96 hazards]
=========
small_step: done
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_findings_are_read():
    """Faults: the lines below a head dropped; the frame counted along."""
    assert sanitizer.findings(CLEAN) == []
    write, read = sanitizer.findings(WRITE)
    assert write.startswith("Invalid __global__ write")
    assert "attention_fwd_kernel" in write
    assert "reduce_kernel" in read
    assert sanitizer.findings(RACE)[0].endswith("[96 hazards]")
    assert [sanitizer.counted(log) for log in (CLEAN, WRITE, RACE)] == [0, 2, 1]


def test_only_what_is_explained_passes():
    """Faults: any explanation explains all; a finding in another form overlooked; a tool that died taken for a clean one."""
    assert sanitizer.unexplained(CLEAN, {}) == []
    assert len(sanitizer.unexplained(WRITE, {})) == 2
    (rest,) = sanitizer.unexplained(WRITE, {"reduce_kernel": "reads what TMA wrote"})
    assert rest.startswith("Invalid")
    assert sanitizer.unexplained(RACE, {"and Read access at attention_fwd_kernel": "ordered by a barrier"}) == []
    other_form = "one finding, written otherwise\n========= ERROR SUMMARY: 1 error\n"
    assert sanitizer.unexplained(other_form, {}) == ["counted in the summary, but not found in the log"]
    with pytest.raises(AssertionError, match="no summary"):
        sanitizer.unexplained("========= COMPUTE-SANITIZER\n", {})
