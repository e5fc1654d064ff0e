"""Builds the native module without an installation, and lays the package out as an installation would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Everything that `make gpu` makes, beside the evidence.
HOME = ROOT / "build" / "gpu"
SITE = HOME / "site"


def find_nvcc() -> str | None:
    """CUDACXX, CUDA_HOME, the PATH, or where a toolkit is usually installed."""
    named = os.environ.get("CUDACXX")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    usual = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, [named] if named else usual)), None)


def architecture() -> str:
    """That of the first GPU, as 90."""
    said = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    return re.sub(r"\D", "", said.stdout.split()[0])


def tool(package: str, directory: str) -> str:
    """A program from its PyPI package, or from the system."""
    try:
        found = shutil.which(package, path=getattr(__import__(package), directory))
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(package)
    if found is None:
        raise RuntimeError(f"{package} is not installed")
    return found


def native(device: str) -> Path:
    """Where the native module is built."""
    return HOME / f"native-{sysconfig.get_config_var('SOABI')}-{device}"


def build(device: str) -> dict[str, object]:
    """Compiles the native module: with CUDA for the architecture of this machine's GPU, or for a rehearsal without.

    Returns what was built. Raises subprocess.CalledProcessError with the compiler's words on stdout.
    """
    import pybind11

    target = native(device)
    cuda = ["-DMFD_FAST_CUDA=OFF"]
    facts: dict[str, object] = {"compiler": subprocess.getoutput("c++ --version").split("\n", 1)[0]}
    if device == "cuda":
        nvcc, arch = find_nvcc(), architecture()
        if nvcc is None:
            raise RuntimeError("nvcc was not found: name it in CUDACXX")
        cuda = ["-DMFD_FAST_CUDA=ON", f"-DMFD_FAST_CUDA_ARCHS={arch}", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
        facts |= {"nvcc": subprocess.getoutput(f"{nvcc} --version").rsplit("\n", 1)[-1], "arch": f"sm_{arch}"}
    cmake = tool("cmake", "CMAKE_BIN_DIR")
    configure = [
        *(cmake, "-S", ROOT, "-B", target, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *cuda,
    ]
    subprocess.run(list(map(str, configure)), check=True)
    subprocess.run([cmake, "--build", str(target)], check=True)
    lay_out(target / "_C.so")
    return facts


def lay_out(module: Path) -> None:
    """``SITE``: the package with its native module and its Triton kernels, and the benchmarks, as links."""
    shutil.rmtree(SITE, ignore_errors=True)
    package, kernels = SITE / "mfd_fast", SITE / "mfd_fast" / "kernels"
    kernels.mkdir(parents=True)
    for path in (ROOT / "mfd_fast").iterdir():
        if path.name not in ("kernels", "__pycache__") and path.suffix != ".so":
            (package / path.name).symlink_to(path)
    (kernels / "__init__.py").symlink_to(ROOT / "mfd_fast" / "kernels" / "__init__.py")
    (kernels / "triton").symlink_to(ROOT / "kernels" / "triton")
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").symlink_to(module)
    (SITE / "benchmarks").symlink_to(ROOT / "benchmarks")


def environment(device: str, emulate: bool = False) -> dict[str, str]:
    """Of the processes that use what was laid out; their working directory is ``SITE``.

    ``emulate`` asks for the CPU's stand-ins where there is no conftest to do so.
    """
    folders = (".", "gpu", "support", "ops", "backends/cpu", "backends/cuda", "backends/triton")
    paths = [SITE, *(ROOT / "tests" / folder for folder in folders), os.environ.get("PYTHONPATH")]
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MFD_FAST_CUDA_EMULATOR")}
    found = {
        **kept,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "MFD_FAST_TEST_DEVICE": device,
        "TRITON_CACHE_DIR": str(HOME / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(HOME / "inductor"),
    }
    if emulate and device == "cpu":
        sys.path.insert(0, str(ROOT / "tests"))
        import cuda_emulator

        found |= {"TRITON_INTERPRET": "1", "MFD_FAST_CUDA_EMULATOR": str(cuda_emulator.module())}
    return found
