#!/usr/bin/env python3
"""One command each for the tests and for the training example; both do their own set-up.

    python3 run.py test  [--here] [pytest arguments]               ruff, mypy, then pytest
    python3 run.py train [--here] [examples/train_lm.py arguments]

The first call makes .venv beside this file and installs torch and the package into it; later calls go straight on until
pyproject.toml changes. --here installs nothing: it takes this interpreter with the packages that it has.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

# Installed first and pinned: without the pin an installer would fetch whatever build is newest
TORCH = "torch==2.13.0"
EXTRAS = {"test": "dev", "train": "examples"}
ROOT = Path(__file__).resolve().parent
ENV = ROOT / ".venv"
PYTHON = ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fail(message):
    sys.exit(f"run.py: {message}")


def run(*command, **variables):
    print("+", *command, flush=True)
    # From the root, so that `import gqa_autograd` works with --here, where nothing is installed
    variables |= {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.call(command, cwd=ROOT, env=variables)


def pip_install(*what):
    print("run.py: installing", *what, flush=True)
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *what]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["no message"]
        fail(f"pip could not install {what[-1]} ({errors[-1].strip()}); without a network, use --here")


def has_nvidia_driver():
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def set_up(command):
    """The interpreter of .venv, made or brought up to date if this command's stamp does not fit."""
    extras = EXTRAS[command] + (",cuda,nvcc" if has_nvidia_driver() else "")
    told = "\n".join([TORCH, extras, sys.version, str(ROOT), (ROOT / "pyproject.toml").read_text(encoding="utf-8")])
    digest = hashlib.sha256(told.encode()).hexdigest()
    stamp = ENV / f"ready-{command}"
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == digest:
        return str(PYTHON)
    python = ENV / "python-version"
    same_python = PYTHON.exists() and python.exists() and python.read_text() == sys.version
    try:
        venv.EnvBuilder(with_pip=True, clear=not same_python).create(ENV)
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"cannot make {ENV.name} ({error}); on Debian and Ubuntu the package python3-venv is needed")
    python.write_text(sys.version)
    pip_install(TORCH)
    pip_install("-e", f".[{extras}]")
    stamp.write_text(digest)
    return str(PYTHON)


def lint(python, here):
    """An exit status other than 0 of ruff or mypy, if there was one; with --here a missing tool is left out, and said to be."""
    commands = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))
    missing = {tool for tool, *_ in commands if here and importlib.util.find_spec(tool) is None}
    if missing:
        print(f"run.py: {' and '.join(sorted(missing))} not installed here, left out", flush=True)
    statuses = [run(python, "-m", tool, *arguments) for tool, *arguments in commands if tool not in missing]
    return next(filter(None, statuses), 0)


def test(python, here, arguments):
    status = lint(python, here)
    # One card is not shared by several processes
    variables, serial = {}, any("gpu" in a or a.startswith(("-n", "--numprocesses")) for a in arguments)
    if not serial and (not here or importlib.util.find_spec("xdist")):
        # Tests side by side share compiled kernels, and some take a hundred times as long as others
        arguments = ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal", *arguments]
        variables = {"OMP_NUM_THREADS": "1"}
    tested = run(python, "-m", "pytest", *arguments, **variables)
    if status:
        print("run.py: pytest is done, but ruff or mypy failed above", flush=True)
    return tested or status


def main(arguments):
    if sys.version_info < (3, 10):  # noqa: UP036, any python3 may run this file
        fail("Python 3.10 or newer is needed, this is " + sys.version.split()[0])
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    command, *rest = arguments
    if command not in EXTRAS:
        fail(f"unknown command {command!r}, use test or train")
    here = "--here" in rest
    rest = [a for a in rest if a != "--here"]
    for package in ("torch", "pytest") if command == "test" else ("torch",):
        if here and importlib.util.find_spec(package) is None:
            fail(f"--here needs {package} in {sys.executable}")
    python = sys.executable if here else set_up(command)
    return test(python, here, rest) if command == "test" else run(python, "examples/train_lm.py", *rest)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
