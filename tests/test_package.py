"""The house rules: who imports whom, what an import touches, one version everywhere, files short, README and metadata true."""

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gqa_autograd

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gqa_autograd"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = (".ci", "benchmarks", "docs", "examples", "gqa_autograd", "hopper_emulator", "tests")
MODULES = sorted(PACKAGE.rglob("*.py"))
FILES = sorted(
    p
    for p in [*ROOT.glob("*"), ROOT / ".pre-commit-config.yaml", *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*"))]
    if p.is_file() and "__pycache__" not in p.parts
)

# What each part may import of the package. "(kernels)": only inside a function, so that importing the package needs no compiler
MAY_IMPORT = {
    "__init__": {"_version", "functional", "functional_decode", "ops_varlen", "nn", "distributed", "cache", "support"},
    "_version": set(),
    "cache": {"ops_cache", "checks_decode", "pages"},
    "checks": set(),
    "checks_cache": {"checks"},
    "checks_decode": {"checks"},
    "checks_nn": {"cache", "checks_decode"},
    "distributed": {"distributed", "functional"},
    "flops": set(),
    "functional": {"ops", "ops_varlen", "checks", "plans", "(kernels)"},
    "functional_decode": {"functional", "ops", "ops_decode", "checks", "checks_decode"},
    "hf": {"cache", "functional"},
    "kernels": {"kernels"},
    "meta": set(),
    "nn": {"functional", "functional_decode", "cache", "checks_nn"},
    "ops": {"meta", "checks", "flops", "plans", "reference", "(kernels)"},
    "ops_cache": {"ops", "checks_cache", "reference", "(kernels)"},
    "ops_decode": {"ops", "meta", "checks_decode", "flops", "plans", "reference", "(kernels)"},
    "ops_varlen": {"ops", "meta", "checks", "flops", "reference", "(kernels)"},
    "pages": set(),
    "plans": set(),
    "reference": {"reference"},
    "support": {"functional", "functional_decode", "ops", "ops_decode", "ops_varlen", "checks", "support_decode", "(kernels)"},
    "support_decode": {"functional_decode", "ops_cache", "checks", "(kernels)"},
    "testing": {"reference", "functional", "meta", "checks"},
    "testing_decode": {"testing", "reference", "checks"},
    "testing_varlen": {"testing", "functional", "checks"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted absolute name, is it inside a function?) for each import of a file; `from a import b` counts as a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    inside = {id(n) for f in functions for n in ast.walk(f)}
    home = path.relative_to(ROOT).with_suffix("").parts
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(home[: len(home) - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found += [(f"{module}.{alias.name}", id(node) in inside) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_import_rule(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"say in MAY_IMPORT what {part} may import"
    outside = {"torch", *{"kernels": ["tilelang"], "hf": ["transformers"]}.get(part, [])}
    for name, inside_function in imports(path):
        root, *rest = name.split(".")
        if root == "gqa_autograd":
            target = f"({rest[0]})" if rest[0] == "kernels" != part and inside_function else rest[0]
            assert target in MAY_IMPORT[part], f"{part} must not import {name}" + ("" if inside_function else " at module level")
        else:
            assert root in outside or root in sys.stdlib_module_names, f"{part} must not import {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "hopper_emulator").glob("*.py")), ids=relative)
def test_emulator_stands_alone(path):
    roots = {name.split(".")[0] for name, _ in imports(path)} - set(sys.stdlib_module_names)
    assert roots <= {"hopper_emulator", "torch", "numpy", "tilelang"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_import_is_hidden(path):
    """An import by name would slip past the rule."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert called not in ("import_module", "__import__"), f"line {node.lineno}"


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) == "kernels"], ids=relative)
def test_kernels_keep_their_annotations(path):
    assert not any(name.startswith("__future__") for name, _ in imports(path)), "a size used only in a T.Tensor annotation would be lost"


# --- what an import touches ---
BARE = '''
import json, socket, sys

class Without:
    """A finder as it would be on a machine where these are not installed."""
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in ("tilelang", "tvm", "tvm_ffi", "triton")
        return None if absent else self.finder.find_spec(name, path, target)

def no_network(*args, **kwargs):
    raise AssertionError("a socket was opened")

sys.meta_path[:] = map(Without, sys.meta_path)
import torch
socket.socket = socket.create_connection = socket.getaddrinfo = no_network
before = set(sys.modules)
import gqa_autograd
imported = {name.split(".")[0] for name in set(sys.modules) - before}
q = torch.randn(2, 5, 4, 8, requires_grad=True)
k, v = (torch.randn(2, 7, 2, 8, requires_grad=True) for _ in "kv")
gqa_autograd.attention(q, k, v, causal=True).sum().backward()
print(json.dumps({
    "grads": [t.grad is not None and bool(t.grad.isfinite().all()) for t in (q, k, v)],
    "imported": sorted(imported),
    "loaded": sorted({name.split(".")[0] for name in sys.modules}),
    "kernels": sorted(name for name in sys.modules if name.startswith("gqa_autograd.kernels.")),
    "cuda": torch.cuda.is_initialized(),
}))
'''


@pytest.fixture(scope="module")
def bare():
    """A fresh interpreter without TileLang, Triton or network imports the package and trains one step on the CPU."""
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_cpu_needs_no_compiler_and_no_network(bare):
    assert bare["grads"] == [True, True, True]
    assert not {"tilelang", "tvm", "tvm_ffi", "triton"} & set(bare["loaded"])
    assert bare["kernels"] == []


def test_import_does_not_touch_the_gpu(bare):
    assert bare["cuda"] is False


def test_import_loads_torch_only(bare):
    assert set(bare["imported"]) - set(sys.stdlib_module_names) <= {"gqa_autograd", "torch", "torchgen", "functorch"}


# --- packaging ---
def test_torch_is_the_only_hard_dependency():
    assert [re.split(r"[<>=!~ \[]", name)[0] for name in PROJECT["project"]["dependencies"]] == ["torch"]


def test_extras():
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["cuda"] == ["tilelang==0.1.15"]
    assert extras["nvcc"] == ["tilelang[nvcc]==0.1.15"]


def test_metadata_carries_licence_and_types(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "gqa_autograd", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "content", format="zip")
    (info,) = (tmp_path / "content").glob("*.dist-info")
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (tmp_path / "content" / "gqa_autograd" / "py.typed").exists()
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", (info / "METADATA").read_text(encoding="utf-8"), re.MULTILINE)
    assert required == ["torch"]
    assert {p.name for p in (tmp_path / "content").iterdir()} == {"gqa_autograd", info.name}


def test_one_version():
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert gqa_autograd.__version__ == newest[1]


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_tool_versions_agree(tool):
    (ours,) = (name for name in PROJECT["project"]["optional-dependencies"]["dev"] if name.startswith(tool))
    hooks = re.findall(rf'"({tool}[^"]*)"', (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert "==" in ours
    assert set(hooks) == {ours}


# --- files ---
@pytest.mark.parametrize("path", [p for p in FILES if p.suffix in (".py", ".cpp", ".h")], ids=relative)
def test_file_is_short(path):
    limit = 120 if path.parent == ROOT / "examples" else 400
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < limit
    if path.suffix != ".py":  # there ruff sees to it
        assert max(map(len, lines), default=0) <= 140


# Raw strings with escapes, so that this file does not find itself
PLACES = re.compile(r"(?<![\w.])/(?:home|root|work|Users|mnt|workspace)/\w|\b[A-Z]:\\Users")
REGISTRIES = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|anaconda\.org|download\.pytorch\.org|ghcr\.io|docker\.io|npmjs\.)")


def test_no_two_test_files_have_one_name():
    """pytest imports them by name alone: of two it would collect one."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix not in (".png", ".gz", ".pt")], ids=relative)
def test_file_names_no_machine_and_no_registry(path):
    text = path.read_text(encoding="utf-8")
    for pattern in (PLACES, REGISTRIES):
        assert not (found := pattern.search(text)), found[0]


# --- what a reader sees ---
@pytest.mark.parametrize("name", gqa_autograd.__all__)
def test_public_docstring(name):
    value = getattr(gqa_autograd, name)
    if not callable(value):
        return
    text = inspect.getdoc(value) or ""
    assert text, "no docstring"
    if inspect.isfunction(value):
        wanted = ["Returns:", *(["Args:", "Raises:"] if inspect.signature(value).parameters else [])]
        assert [part for part in wanted if part not in text] == []


def readme_examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("index", range(len(readme_examples())))
def test_readme_example_runs(index):
    """Each ```python block of the README stands alone and runs on a CPU."""
    source = readme_examples()[index]
    if "transformers" in source:
        pytest.importorskip("transformers")
    exec(compile(source, f"README.md, example {index}", "exec"), {"__name__": "__main__"})


def test_readme_begins_with_a_training_step():
    first = readme_examples()[0]
    assert len(list(filter(None, first.splitlines()))) == 8
    assert ".backward()" in first
    assert ".step()" in first


def test_readme_says_the_essential_in_its_first_40_lines():
    head = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    for essential in (".backward()", "pip install", "run.py test", "run.py train", "CUDA sm_90a", "TFLOP/s", "commit", "`docs/maths/`"):
        assert essential in head, essential
