"""A sample of the battery on other versions than the pinned ones: `make versions`.

A wheel of this tree, built once for each Python, is installed in an environment of its own (below build/versions/)
beside the newest PyTorch that the installer offers, and values, gradients and torch.compile of the quick tier run
there, with the package from the wheel: the tests are copied, the package is not. Another Python than this one, 3.12 or
newer, is taken where one is found that has a PyTorch: none is downloaded for it.
What is left out is said in one line each.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "versions"
SAMPLE = ("tests/ops/test_values.py", "tests/ops/test_gradients.py", "tests/integration/test_compile.py")
#: What the sample imports beside the package, at the versions of constraints.txt; PyTorch brings its own Triton.
PACKAGES = ("numpy", "pytest", "pytest-xdist", "pybind11", "setuptools", "rich", "mpmath")
#: What the sample reads beside the package.
COPIED = ("tests", "benchmarks", "csrc", "kernels", "pyproject.toml")

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
ABOUT = "import sys; print('%d.%d' % sys.version_info[:2])"
TORCH = "import torch; print(torch.__version__.partition('+')[0])"


def run(*command: object, **environ: str) -> None:
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env={**os.environ, **environ})


def asked(python: object, code: str) -> str | None:
    """What ``code`` prints in an interpreter; None where it does not run."""
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def pinned(package: str) -> str:
    match = re.search(rf"^{package}==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match, f"constraints.txt has no {package}"
    return match[1]


def constraints() -> Path:
    """Those of constraints.txt but for PyTorch and what it chooses itself."""
    kept = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not re.match(r"(torch|triton|nvidia-|sympy|networkx|fsspec|filelock|jinja2|typing_extensions)", line, re.I)
    ]
    path = PLACE / "constraints.txt"
    path.write_text("\n".join(kept) + "\n")
    return path


def newer_pythons() -> dict[str, Path]:
    """Interpreters of 3.12 and newer that run here, by version, this one's left out."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found: dict[str, Path] = {}
    for minor in range(20, 11, -1):
        name = f"python3.{minor}"
        for path in [shutil.which(name), *sorted(pyenv.glob(f"3.{minor}.*/bin/{name}"), reverse=True)]:
            version = path and asked(path, ABOUT)
            if version and version != HERE:
                found.setdefault(version, Path(path))
    return found


def wheel(python: Path, version: str) -> Path:
    """The wheel for one Python, without CUDA: its kernels run emulated in the tests."""
    folder = PLACE / f"wheel-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    print(f"wheel: Python {version}", flush=True)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(python, "-m", "pip", "wheel", *options, ROOT, MFD_FAST_CUDA="0")
    (built,) = folder.glob("*.whl")
    return built


def environment(name: str, python: Path, system: bool) -> Path:
    """An environment with the packages of the sample; with PyTorch too unless it is the ``system``'s."""
    folder = PLACE / name
    done = folder / "packages"
    if not done.exists():
        print(f"install: the packages of {name} (takes minutes the first time)", flush=True)
        run(python, "-m", "venv", "--clear", *(["--system-site-packages"] if system else []), folder)
        packages = PACKAGES if system else ("torch", *PACKAGES)
        options = ("--disable-pip-version-check", "install", "--quiet", "--constraint", constraints())
        run(folder / "bin" / "python", "-m", "pip", *options, *packages, "cmake", "ninja")
        done.touch()
    return folder / "bin" / "python"


def tree() -> Path:
    """The tests and what they read, without the package."""
    folder = PLACE / "tree"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "build")
        shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(
            source, folder / name
        )
    return folder


def sample(python: Path, name: str, workers: int, more: list[str], **environ: str) -> int:
    """Runs the sample; its exit status."""
    where = asked(python, "import mfd_fast; print(mfd_fast.__file__)") or ""
    assert Path(where).is_relative_to(PLACE), f"the package of {name} is not the wheel's: {where}"
    print(f"tests: {name}, the wheel with PyTorch {asked(python, TORCH)}", flush=True)
    options = ("-q", "-p", "no:cacheprovider", "--tier", "quick", "-n", str(workers), "--dist", "worksteal", *more)
    command = [str(python), "-m", "pytest", *options, *SAMPLE]
    return subprocess.run(command, cwd=tree(), env={**os.environ, **environ}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    arguments, more = parser.parse_known_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    left_out, failed = [], []

    chosen = [(f"python-{HERE}", Path(sys.executable), False, {"MFD_FAST_CUDA_EMULATOR": emulator()})]
    pythons = newer_pythons()
    for version, path in pythons.items():
        if asked(path, TORCH):
            chosen.append((f"python-{version}", path, True, {}))
        else:
            left_out.append(f"Python {version}: it has no PyTorch, and none is downloaded for it")
    if not pythons and sys.version_info < (3, 12):
        left_out.append("Python 3.12 and newer: no interpreter was found")

    for name, path, system, environ in chosen:
        python = environment(name, path, system)
        torch = asked(python, TORCH)
        if torch == pinned("torch") and not system:
            left_out.append(f"a newer PyTorch: the installer offers {torch}, which is the pinned one")
            continue
        built = wheel(python, name.removeprefix("python-"))
        run(
            python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--force-reinstall", built
        )
        if sample(python, name, arguments.workers, more, **environ):
            failed.append(name)
    for line in left_out:
        print(f"left out: {line}")
    for name in failed:
        print(f"failed: {name}")
    return int(bool(failed))


def emulator() -> str:
    """The emulated CUDA kernels of this Python, built once: they have no tie to a PyTorch."""
    sys.path[:0] = [str(ROOT / "tests")]
    import cuda_emulator

    return str(cuda_emulator.module())


if __name__ == "__main__":
    sys.exit(main())
