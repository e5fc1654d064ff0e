"""Builds the CUDA kernels and launchers for the CPU: the sources of kernels/cuda and csrc/cuda, the host compiler."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LANGUAGE = ("-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off")
INCLUDES = (f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}")
#: Each thread of a block is a thread of the operating system, for ThreadSanitizer.
THREADS = ("-DMFD_EMULATOR_THREADS", "-pthread")


def sources() -> list[Path]:
    """What the module is compiled from."""
    csrc = ROOT / "csrc"
    launchers = sorted(path for path in (csrc / "cuda").rglob("*") if path.suffix in (".cu", ".cpp"))
    bindings = sorted((csrc / "bindings" / "cuda").glob("*.cpp"))
    bindings += [csrc / "bindings" / "problems.cpp", csrc / "bindings" / "plans" / "plans.cpp"]
    return [*launchers, *bindings, HERE / "module.cpp", HERE / "emulator.cpp"]


def _stamp(command: Iterable[str]) -> str:
    """Names a build by its command and by every file it may read."""
    digest = hashlib.sha256(shlex.join(command).encode())
    trees = (
        ROOT / "csrc" / "bindings",
        ROOT / "csrc" / "common",
        ROOT / "csrc" / "cuda",
        ROOT / "kernels" / "cuda",
        HERE,
    )
    files = [path for tree in trees for path in tree.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(inputs: list[Path], output: str, compile_flags: tuple[str, ...], link_flags: tuple[str, ...]) -> Path:
    """Compiles and links, once for each state of the sources; other processes wait."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, *LANGUAGE, *INCLUDES, *compile_flags]
    directory = ROOT / "build" / "cuda-emulator"
    directory.mkdir(parents=True, exist_ok=True)
    result = directory / _stamp([*command, *link_flags, output]) / output
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if result.exists():
            return result
        result.parent.mkdir(exist_ok=True)
        objects = [result.parent / f"{path.parent.name}-{path.name}.o" for path in inputs]

        def run(arguments: list[object]) -> None:
            done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{shlex.join(map(str, arguments))}\n{done.stderr}")

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(
                pool.map(lambda k: run([*command, "-x", "c++", "-c", inputs[k], "-o", objects[k]]), range(len(inputs)))
            )
        partial = result.with_suffix(".partial")
        run([*compiler, *compile_flags, *link_flags, *objects, "-o", partial])
        partial.rename(result)
    return result


def module(*flags: str) -> Path:
    """The module with the emulated kernels; ``flags`` as for sanitizers."""
    import pybind11

    python = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    flags = ("-O1", "-fPIC", "-fvisibility=hidden", *python, *flags)
    return _compile(sources(), "_cuda_emulated.so", flags, ("-shared",))


def program(source: str, *flags: str) -> Path:
    """A program of this directory, linked with the emulator."""
    return _compile([HERE / source, HERE / "emulator.cpp"], Path(source).stem, ("-O1", *flags), ())
