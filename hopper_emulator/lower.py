"""From a TileLang program to the CUDA and host C that TileLang generates for it: no nvcc, no GPU."""

from typing import Any, NamedTuple


class Code(NamedTuple):
    """What TileLang generated: CUDA, and the C that checks the arguments, makes the tensor maps and launches."""

    device: str
    host: str


def lower(factory: Any, *configuration: Any) -> Code:
    """The code of `factory`, a @tilelang.jit function, for one configuration: the same text that its compile() would give to nvcc."""
    from tilelang import tvm
    from tilelang.engine.lower import lower as tilelang_lower

    target = tvm.target.Target(factory.target)
    options = {getattr(key, "value", key): value for key, value in (factory.pass_configs or {}).items()}
    program = factory.get_tir(*configuration)
    with tvm.transform.PassContext(opt_level=3, config=options), target:
        artifact = tilelang_lower(program, target=target, target_host="c", enable_host_codegen=True)
    return Code(artifact.kernel_source, artifact.host_mod.inspect_source())
