"""Launches of the project's own launchers, executed as machine code on the same addresses.

The emulator's module hands every launch over: kernel, grid, shared memory and parameters are the real ones.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from mfd_fast.backends.cuda import launch as scratch

from . import floating, integers, memory  # noqa: F401  (they register what the machine executes)
from .machine import Machine, Trace
from .sass import Kernel, read, sections
from .timing import BUILD

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", "-arch=sm_90", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}")


@dataclass
class Launch:
    """``traces`` by the number of the cluster, of those that were executed."""

    kernel: Kernel
    grid: int
    threads: int
    cluster: int
    shared_bytes: int
    traces: dict[int, Trace] = field(default_factory=dict)

    @property
    def resident_blocks(self) -> int:
        return self.kernel.resident_blocks(self.threads, self.shared_bytes)

    def warps(self, cluster: int = 0) -> list[Any]:
        """What the warps of the first block issued."""
        return self.traces[cluster].of_warps(self.threads // 32)


def compile_cubin(source: Path) -> Path:
    """The sm_90 machine code of a launcher's kernels, once for each state of what it includes."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc was not found")
    listed = subprocess.run([nvcc, *FLAGS, "-MM", source], check=True, capture_output=True, text=True).stdout
    names = [name for name in listed.replace("\\\n", " ").split()[1:] if str(ROOT) in name]
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for name in sorted(names):
        digest.update(Path(name).read_bytes())
    cubin = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.cubin"
    if not cubin.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = cubin.with_suffix(f".{os.getpid()}.cubin")
        subprocess.run([nvcc, *FLAGS, "-cubin", source, "-o", partial], check=True, capture_output=True)
        partial.rename(cubin)
    return cubin


def kernel_of(name: str, source: Path) -> Kernel:
    """All kernels of the source are kept beside the cubin: nvdisasm takes seconds."""
    cubin = compile_cubin(source)

    def kept(of: str) -> Path:
        return cubin.with_suffix(f".{hashlib.sha256(of.encode()).hexdigest()[:12]}.pickle")

    if not kept(name).exists():
        for other, kernel in read(cubin).items():
            partial = kept(other).with_suffix(f".{os.getpid()}")
            partial.write_bytes(pickle.dumps(kernel))
            partial.replace(kept(other))
    return pickle.loads(kept(name).read_bytes())  # type: ignore[no-any-return]


def symbols(module: Path) -> dict[int, str]:
    """Functions of a shared library by their offset."""
    elf = sections(module.read_bytes())
    table, strings = elf[".symtab"][1], elf[".strtab"][1]
    found = {}
    for at in range(0, len(table), 24):
        name, kind = int.from_bytes(table[at : at + 4], "little"), table[at + 4] & 15
        if kind == 2:
            offset = int.from_bytes(table[at + 8 : at + 16], "little")
            found[offset] = strings[name : strings.index(b"\0", name)].decode()
    return found


def _loaded_at(module: Path) -> int:
    with open("/proc/self/maps") as maps:
        return min(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(str(module)))


class Recorder:
    """Takes the launches of ``module``, the emulator's Python module.

    ``sources`` maps a pattern of a kernel's name to its file. ``clusters``: which clusters of a grid
    are executed, all where it is None; ``kernels``: of those with such a name alone, where it is given.
    """

    def __init__(
        self,
        module: Any,
        sources: dict[str, Path],
        clusters: set[int] | None = None,
        kernels: tuple[str, ...] = ("",),
    ):
        self.launches: list[Launch] = []
        self._kernels = kernels
        self._module, self._sources, self._clusters = module, sources, clusters
        path = Path(module.__file__)
        self._symbols, self._base = symbols(path), _loaded_at(path)

    def kernel(self, address: int) -> Kernel:
        name = self._symbols[address - self._base]
        return kernel_of(name, next(path for pattern, path in self._sources.items() if re.search(pattern, name)))

    def _take(self, address: int, grid: int, threads: int, cluster: int, shared: int, parameters: bytes) -> None:
        launch = Launch(self.kernel(address), grid, threads, cluster, shared)
        self.launches.append(launch)
        if not any(name in launch.kernel.name for name in self._kernels):
            return
        for number in range(grid // cluster) if self._clusters is None else sorted(self._clusters):
            machine = Machine(launch.kernel, parameters, threads, grid, cluster, number * cluster)
            launch.traces[number] = machine.run()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """On scratch memory of its own: the blocks of a launch that is executed in part leave their tickets there."""
        self._module.set_registers(lambda address: self.kernel(address).registers)
        self._module.intercept(self._take)
        try:
            with mock.patch.object(scratch, "_workspaces", {}):
                yield
        finally:
            self._module.intercept(None)
            self._module.set_registers(None)
