"""Builds the native module without an installation, and lays the package out as an installation would."""

from __future__ import annotations

import hashlib
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


def sources() -> str:
    """Names the state of what the native module is compiled from."""
    found = hashlib.sha256((ROOT / "CMakeLists.txt").read_bytes())
    for tree in (ROOT / "csrc", ROOT / "kernels" / "cuda"):
        for path in sorted(path for path in tree.rglob("*") if path.is_file()):
            found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()


def module(device: str) -> Path | None:
    """A native module of these sources that this interpreter can load: built or carried here; in a rehearsal ours."""
    found, stamp = native(device) / "_C.so", native(device) / "_C.sources"
    if found.exists() and not (stamp.exists() and stamp.read_text() == sources()):
        return None
    if device == "cpu" and not found.exists():
        found = next((ROOT / "mfd_fast").glob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}"), found)
    if not found.exists():
        return None
    wanted = "hasattr(m, 'cuda')" if device == "cuda" else "True"
    script = (
        "import importlib.util as u, sys\n"
        "s = u.spec_from_file_location('_C', sys.argv[1]); m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        f"sys.exit(not {wanted})"
    )
    done = subprocess.run([sys.executable, "-c", script, str(found)], capture_output=True)
    return found if done.returncode == 0 else None


def build(device: str, arch: str | None = None) -> Path:
    """Compiles the native module: with CUDA for ``arch`` or this machine's GPU, or for a rehearsal without.

    The compiler's warnings are not errors: another compiler than CI's has others. Raises
    subprocess.CalledProcessError with the compiler's words on stdout, RuntimeError, OSError or ImportError.
    """
    import pybind11

    target = native(device)
    cuda = ["-DMFD_FAST_CUDA=OFF"]
    if device == "cuda":
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("nvcc was not found: name it in CUDACXX")
        archs = f"-DMFD_FAST_CUDA_ARCHS={arch or architecture()}"
        cuda = ["-DMFD_FAST_CUDA=ON", archs, f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    cmake = tool("cmake", "CMAKE_BIN_DIR")
    configure = [
        *(cmake, "-S", ROOT, "-B", target, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DMFD_FAST_WERROR=OFF"),
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *cuda,
    ]
    subprocess.run(list(map(str, configure)), check=True)
    stamp, state = target / "_C.sources", sources()
    stamp.unlink(missing_ok=True)
    subprocess.run([cmake, "--build", str(target)], check=True)
    stamp.write_text(state)
    return target / "_C.so"


def planted() -> Path:
    """The program with planted faults, compiled once for this machine's GPU. Raises as ``build`` does."""
    program, source = HOME / "planted", ROOT / "tests" / "gpu" / "planted.cu"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("nvcc was not found: name it in CUDACXX")
        HOME.mkdir(parents=True, exist_ok=True)
        subprocess.run([nvcc, f"-arch=sm_{architecture()}", "-lineinfo", "-o", program, source], check=True)
    return program


def lay_out(module: Path | None) -> None:
    """``SITE``: the package with its native module, if there is one, and its Triton kernels, and the benchmarks."""
    shutil.rmtree(SITE, ignore_errors=True)
    package, kernels = SITE / "mfd_fast", SITE / "mfd_fast" / "kernels"
    kernels.mkdir(parents=True)
    for path in (ROOT / "mfd_fast").iterdir():
        if path.name not in ("kernels", "__pycache__") and path.suffix != ".so":
            (package / path.name).symlink_to(path)
    (kernels / "__init__.py").symlink_to(ROOT / "mfd_fast" / "kernels" / "__init__.py")
    (kernels / "triton").symlink_to(ROOT / "kernels" / "triton")
    if module is not None:
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
