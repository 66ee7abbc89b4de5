"""Gates on what nvcc makes of every kernel configuration: a spill or a serialised product costs a quarter of the speed, in silence."""

import pytest
import resources

tilelang = pytest.importorskip("tilelang", reason="no tilelang here: the kernels were not compiled")
CONFIGURATIONS = resources.configurations()


@pytest.fixture(scope="module")
def committed():
    return resources.committed()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_resources(name, committed):
    found = resources.measure(CONFIGURATIONS[name]().get_kernel_source())
    assert found.spilled == 0
    assert found.remarks == []
    assert found.asked <= found.registers * found.warpgroups, "more registers asked for than launched: the kernel would hang"
    if name.startswith(("forward", "backward")):
        assert found.products > 0
        assert found.asked > 0
    # With a compiler that has no rows yet, the gates above are all there is to hold
    if name in committed:
        assert found == committed[name], f"{name} moved; if it is meant to, run python tests/kernels/resources.py"


def test_every_configuration_has_a_row():
    rows = {line.split('"')[3] for line in resources.DATA.read_text(encoding="utf-8").splitlines()}
    assert rows == set(CONFIGURATIONS)
