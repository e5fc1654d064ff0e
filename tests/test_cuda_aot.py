"""What nvcc makes of the CUDA kernels, for every architecture: no warning, no spill, 16-byte loads and stores.

Without nvcc there is nothing to look at; the native module must then say that it has no CUDA kernels.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import aot
import mfd_fast._C
import pytest

from mfd_fast.backends import cuda

ROOT = Path(__file__).resolve().parents[1]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}")
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
#: What each source has to hold, and how many of them at least.
KERNELS = {
    "distill.cu": {"distill_forward": 3},
    "distill_backward.cu": {"distill_backward": 3},
    "distill_mixture.cu": {"mixture_forward": 3},
    "mixture_backward.cu": {"mixture_backward": 3},
    "topk.cu": {"topk_rows": 3},
    "feature_loss.cu": {"match_taps": 3, "scale_all": 1},
    "mfd_loss.cu": {"mfd_single_pass": 1},
    "modal_pool.cu": {"pool_forward": 3, "pool_backward": 3, "pool_sums": 2},
}
#: Their rows are copied to shared memory; the backward ones read them from the caches.
PARKING = set(KERNELS) - {"distill_backward.cu", "mixture_backward.cu", "mfd_loss.cu"}
CASES = [(source, arch) for arch in ARCHITECTURES for source in SOURCES] if NVCC else []


def compiled(source: str, arch: int, folder: Path) -> tuple[dict[str, str], Path]:
    """ptxas' words about each kernel, by its mangled name, and the cubin."""
    cubin = folder / f"{source}-{arch}.cubin"
    command = [NVCC, *FLAGS, f"-arch=sm_{arch}", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, ROOT / "csrc" / "cuda" / source, "-o", cubin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = re.split(r"Compiling entry function '(\w+)' for '\w+'", done.stderr)
    return dict(zip(parts[1::2], parts[2::2], strict=True)), cubin


@pytest.mark.parametrize(("source", "arch"), CASES, ids=str)
def test_kernels_compile_without_spills(source: str, arch: int, tmp_path: Path) -> None:
    kernels, cubin = compiled(source, arch, tmp_path)
    for pattern, count in KERNELS[source].items():
        assert sum(bool(re.search(pattern, name)) for name in kernels) >= count, pattern
    for name, said in kernels.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, f"{name}: {said}"
        # Of 65536 registers: two blocks of 256 threads of the lean kernels, three of 128 where a warp has a row.
        registers = int(re.search(r"Used (\d+) registers", said)[1])
        lean = "distill_forward" in name and "Lb1EEE" in name
        assert registers <= (255 if not lean else 168 if "4Warp" in name else 128), f"{name}: {said}"
    seen = aot.inspect_cubin(cubin.read_bytes(), 0, "")
    assert seen.local_instructions == 0
    assert seen.load_widths["128"] > 0
    assert seen.store_widths["128"] > 0
    if source == "mfd_loss.cu":
        assert re.search(r"\bHMMA\.16816\.F32\.BF16\b", aot.disassemble(cubin)), "the products miss the tensor cores"
    # Disassembling takes as long as compiling: what no architecture changes is looked for on one.
    elif source in PARKING and (source == "distill.cu" or arch == 90):
        sass = aot.disassemble(cubin)
        assert re.search(r"\bLDGSTS\.E\.BYPASS\.128\b", sass), "rows are not parked by copies of 16 bytes"
    if source == "distill.cu":
        assert bool(re.search(r"\bUCGABAR_(ARV|WAIT)\b", sass)) == (arch >= 90), "barriers of clusters"


def test_the_module_has_the_kernels_where_nvcc_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports without a driver, and says why they cannot run here."""
    assert hasattr(mfd_fast._C, "cuda") == bool(NVCC)
    monkeypatch.delenv("MFD_FAST_CUDA_EMULATOR")
    cuda.available.cache_clear()
    cuda.native.cache_clear()
    try:
        reason = cuda.available()
    finally:
        monkeypatch.undo()
        cuda.available.cache_clear()
        cuda.native.cache_clear()
    assert reason is not None
    assert ("no GPU" if NVCC else "built without CUDA") in reason
