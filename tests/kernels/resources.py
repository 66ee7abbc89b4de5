"""What nvcc says of every kernel configuration. `python tests/kernels/resources.py` prints the table and renews resources.jsonl.

No GPU is needed: TileLang with a CUDA toolkit, or with the one that `pip install tilelang[nvcc]` brings.
"""

import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gqa_autograd.kernels import config

DATA = Path(__file__).with_name("resources.jsonl")
WARPGROUP = 128


class Resources(NamedTuple):
    """registers at launch; registers that the warpgroups ask for with setmaxnreg, in all; bytes spilled; warpgroup products in the source;
    codes of ptxas' remarks on wgmma (C7510 and its like: every product waits for the one before)."""

    registers: int
    warpgroups: int
    asked: int
    spilled: int
    products: int
    remarks: list[str]


def _forward(tile: config.Forward, dtype: torch.dtype, return_lse: bool) -> Any:
    from gqa_autograd.kernels import forward

    return forward.compiled(tile, dtype, return_lse)


def _backward(part: int, tile: config.Backward, dtype: torch.dtype, has_dlse: bool) -> Any:
    from gqa_autograd.kernels import backward

    return backward.compiled(tile, dtype, has_dlse)[part]


def configurations() -> dict[str, Callable[[], Any]]:
    """Every kernel that `config` offers, by a readable name."""
    found: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for tile in config.FORWARD.values():
            for lse in (False, True):
                mask = "causal" if tile.causal else "full"
                found[f"forward-d{tile.D}-{mask}-{name}" + "-lse" * lse] = functools.partial(_forward, tile, dtype, lse)
        for back in config.BACKWARD.values():
            mask = "causal" if back.causal else "full"
            found[f"backward-d{back.D}-{mask}-{name}"] = functools.partial(_backward, 1, back, dtype, False)
            for dlse in (False, True):
                found[f"preprocess-d{back.D}-{name}" + "-dlse" * dlse] = functools.partial(_backward, 0, back, dtype, dlse)
            found[f"postprocess-d{back.D}-{name}"] = functools.partial(_backward, 2, back, dtype, False)
    return found


def versions() -> dict[str, str]:
    import tilelang
    from tilelang.contrib import nvcc

    text = subprocess.run([nvcc.get_nvcc_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    return {"tilelang": tilelang.__version__, "nvcc": re.findall(r"V(\d+\.\d+\.\d+)", text)[0]}


def measure(source: str) -> Resources:
    """Compiles the CUDA source of a kernel once more, for ptxas to speak."""
    said = _ptxas(source)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return Resources(
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        warpgroups=int(re.findall(r"__launch_bounds__\((\d+)", source)[0]) // WARPGROUP,
        asked=sum(map(int, re.findall(r"warpgroup_reg_(?:de)?alloc<(\d+)>", source))),
        spilled=sum(int(number) for numbers in spills for number in numbers),
        products=len(re.findall(r"tl::wgmma_[rs]s<", source)),
        remarks=sorted(set(re.findall(r"\bC75\d\d\b", said))),
    )


def _ptxas(source: str) -> str:
    from tilelang.contrib import nvcc

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cu"
        file.write_text(source)
        command = [nvcc.get_nvcc_compiler(), "-gencode", "arch=compute_90a,code=sm_90a", "-std=c++17", "-O3", "-w", "--use_fast_math"]
        command += [f"-I{nvcc.TILELANG_TEMPLATE_PATH}", f"-I{nvcc.CUTLASS_INCLUDE_DIR}", "-Xptxas", "-v", "--cubin"]
        done = subprocess.run([*command, "-o", f"{folder}/kernel.cubin", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def committed() -> dict[str, Resources]:
    """The rows of the versions in use, empty where they are not in the data."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    mine = versions()
    return {row["kernel"]: Resources(**row["resources"]) for row in rows if mine.items() <= row.items()}


def main() -> None:
    mine = versions()
    kept = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()] if DATA.exists() else []
    rows = [row for row in kept if not mine.items() <= row.items()]
    print(f"tilelang {mine['tilelang']}, nvcc {mine['nvcc']}\n{'kernel':40} registers  asked/launched  spilled  products  remarks")
    for name, build in configurations().items():
        r = measure(build().get_kernel_source())
        rows.append({"kernel": name, **mine, "resources": r._asdict()})
        launched = r.registers * r.warpgroups
        print(f"{name:40} {r.registers:9}  {r.asked:>5}/{launched:<8}  {r.spilled:7}  {r.products:8}  {' '.join(r.remarks)}", flush=True)
    DATA.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
