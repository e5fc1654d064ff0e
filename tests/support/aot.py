"""Ahead-of-time compilation of Triton kernels for GPUs that are not here, and what the machine code says.

:class:`Compiler` works in a process of its own: kernels that were defined under ``TRITON_INTERPRET=1``, as they
are in a test session, cannot be compiled.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import verdicts
from typing_extensions import Self

#: What reads the machine code.
READERS = (Path(__file__).resolve(),)
KERNELS = verdicts.ROOT / "kernels" / "triton"


@dataclass(frozen=True)
class Report:
    """Facts about one compiled kernel. Widths are bits per thread of the instructions for global memory, and for
    memory of which the kernel learns at run time only whether it is global or shared.
    """

    registers: int
    stack: int
    local_instructions: int
    shared: int
    load_widths: dict[str, int]
    store_widths: dict[str, int]
    double_instructions: int
    tensor_core_instructions: int
    ttir: str


class Compiler:
    """A process of its own, without the interpreter, that compiles one launch after the other.

    ``module.launches(name)`` returns the arguments of :func:`compile_kernel`; ``module`` lies beside this file.
    """

    def __init__(self, triton: str | None = None) -> None:
        """``triton``: a folder with another Triton than the environment's."""
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self._cache = tempfile.TemporaryDirectory()
        environment["TRITON_CACHE_DIR"] = self._cache.name
        if triton is not None:
            environment["PYTHONPATH"] = triton
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._cache.cleanup()

    def report(self, module: str, name: str) -> Report:
        """Facts about ``module.launches(name)``."""
        return Report(**self._ask("compile", module, name))

    def keys(self, module: str, name: str) -> list[str]:
        """Keys in the launcher's cache of every call of ``module.variants(name)``."""
        found: list[str] = self._ask("keys", module, name)
        return found

    def version(self) -> str:
        """Of the Triton that compiles."""
        found: str = self._ask("version", "triton", "")
        return found

    def _ask(self, *question: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"{question} failed:\n{answer['error']}")
        return answer["found"]


def compile_kernel(
    kernel: Any, arguments: dict[str, Any], capability: int, warps: int, more: dict[str, Any] | None = None
) -> Report:
    """Facts about :func:`compiled`, kept for the same sources of the kernel, parameters, options, Triton and assembler.

    Triton's hash of the kernel covers the functions that it calls, not the fields of the tuples.
    """
    import triton

    source, target, options = _source(kernel, arguments, capability, warps, more)
    tools = (_tuples(), triton.__version__, os.environ.get("TRITON_PTXAS_PATH"))

    def check() -> dict[str, Any]:
        found = triton.compile(source, target=target, options=options)
        return asdict(inspect_cubin(found.asm["cubin"], found.metadata.shared, found.asm["ttir"]))

    return Report(**verdicts.kept("triton", READERS, (source.hash(), target, sorted(options.items()), *tools), check))


def compiled(
    kernel: Any, arguments: dict[str, Any], capability: int, warps: int, more: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """``kernel`` as its launch with ``arguments`` on a GPU of ``capability`` (90: sm_90) would compile it, and its
    parameters' types.

    Tensors among the arguments may live anywhere: only dtype and alignment count.
    """
    from triton.compiler import compile  # noqa: A004

    source, target, options = _source(kernel, arguments, capability, warps, more)
    return compile(source, target=target, options=options), source.signature


@functools.cache
def _tuples() -> list[str]:
    """The fields of every NamedTuple of the kernels."""
    trees = [ast.parse(path.read_text()) for path in sorted(KERNELS.rglob("*.py"))]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return [f"{c.name} {[ast.unparse(n) for n in c.body if isinstance(n, ast.AnnAssign)]}" for c in classes]


def _source(
    kernel: Any, arguments: dict[str, Any], capability: int, warps: int, more: dict[str, Any] | None
) -> tuple[Any, Any, dict[str, Any]]:
    """What `triton.compile` takes: source, target, options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from mfd_fast.backends.triton.launch import compile_options

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    options = compile_options(warps) | (more or {})
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    known = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    assert len(known) == len(arguments), f"unknown arguments: {arguments.keys() - known.keys()}"
    bound, specialization, rest = binder(**known, **options)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, rest, bound, specialization, rest)
    return ASTSource(kernel, signature, constexprs, attributes), target, parsed.__dict__


def specialization_key(kernel: Any, arguments: dict[str, Any], capability: int) -> str:
    """What the launcher's cache of compiled kernels distinguishes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", capability, 32))
    return str(create_function_from_signature(kernel.signature, kernel.params, backend)(**arguments)[1])


def inspect_cubin(cubin: bytes, shared: int, ttir: str) -> Report:
    """Facts about the cubin of one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return inspect(resources(path), disassemble(path), shared, ttir)


def inspect(kernels: dict[str, tuple[int, int]], sass: str, shared: int = 0, ttir: str = "") -> Report:
    """The same of :func:`resources` and machine code; of several kernels, the most registers and stack of any."""
    operations = re.findall(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", sass, re.MULTILINE)
    assert any(op == "EXIT" for op in operations), "no instructions recognised"
    return Report(
        registers=max(registers for registers, _ in kernels.values()),
        stack=max(stack for _, stack in kernels.values()),
        local_instructions=sum(op.split(".")[0] in ("LDL", "STL") for op in operations),
        shared=shared,
        load_widths=_widths(operations, "LDG", "LD"),
        store_widths=_widths(operations, "STG", "ST"),
        double_instructions=sum(op.split(".")[0] in ("DADD", "DMUL", "DFMA", "DSETP") for op in operations),
        # mma.sync, wgmma and tcgen05.mma in machine code
        tensor_core_instructions=sum(bool(re.match(r"(HMMA|HGMMA|UTC\w*MMA)\b", op)) for op in operations),
        ttir=ttir,
    )


# The triton wheel carries cuobjdump and nvdisasm.
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@functools.cache
def resources(cubin: Path) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack of each kernel, by its mangled name."""
    usage = _output(_tools() / "cuobjdump", "-res-usage", cubin)
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


def cubins_of(module: Path, folder: Path) -> list[Path]:
    """Those inside a shared library, written to ``folder``; their names end in ``.sm_90.cubin``."""
    subprocess.run([_tools() / "cuobjdump", "-xelf", "all", module], check=True, capture_output=True, cwd=folder)
    return sorted(folder.glob("*.cubin"))


def disassemble(cubin: Path) -> str:
    """Machine code of all kernels of a cubin."""
    return _output(_tools() / "nvdisasm", "-c", cubin)


def _output(*command: Any) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def _widths(operations: list[str], *names: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for op in operations:
        parts = op.split(".")
        if parts[0] in names:
            small = [int(p[1:]) for p in parts if p in ("U8", "S8", "U16", "S16")]
            wide = [int(p) for p in parts if p in ("64", "128", "256")]
            width = str((small or wide or [32])[0])
            counts[width] = counts.get(width, 0) + 1
    return counts


def _answer(task: str, module: str, name: str) -> Any:
    jobs = importlib.import_module(module)
    if task == "version":
        return jobs.__version__
    if task == "keys":
        return [specialization_key(k, a, 90) for k, a, *_ in jobs.variants(name)]
    return asdict(compile_kernel(*jobs.launches(name)))


def _serve() -> None:
    """Answers the questions of a :class:`Compiler`, one per line."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        try:
            answer = {"found": _answer(*json.loads(line))}
        except Exception:
            answer = {"error": traceback.format_exc()[-9000:]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
