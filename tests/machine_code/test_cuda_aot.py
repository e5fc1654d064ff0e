"""What nvcc makes of the CUDA kernels: no warning, no spill, 16-byte loads and stores.

``MFD_FAST_AOT=complete`` compiles every source for every architecture (`make aot`).

Without nvcc there is nothing to look at; the native module must then say that it has no CUDA kernels.
"""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import aot
import mfd_fast._C
import pytest
import verdicts

from mfd_fast.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}")
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(path.relative_to(CUDA).as_posix() for path in CUDA.rglob("*.cu"))
#: What each source has to hold, and how many of them at least.
KERNELS = {
    "distill/forward.cu": {"distill_forward": 3},
    "distill/lean_forward_kl.cu": {r"lean_warp\w+DivergenceE0E": 12, r"lean_block\w+DivergenceE0E": 6},
    "distill/lean_pointwise.cu": {r"lean_warp\w+DivergenceE[15]E": 8, r"lean_block\w+DivergenceE[15]E": 8},
    "distill/lean_of_mean.cu": {r"lean_warp\w+DivergenceE[234]E": 6, r"lean_block\w+DivergenceE[234]E": 6},
    "distill/lean_target.cu": {r"lean_warp\w+DivergenceE[78]E": 8, r"lean_block\w+DivergenceE[78]E": 8},
    "distill/backward.cu": {"distill_backward": 3},
    "distill/mixture_forward.cu": {"mixture_forward": 3},
    "distill/mixture_backward.cu": {"mixture_backward": 3},
    "topk/topk.cu": {"topk_rows": 3},
    "fusion/feature_loss.cu": {"lean_match_taps": 18, r"\dmatch_taps": 3, "scale_all": 1},
    "fusion/mfd_loss.cu": {"mfd_single_pass": 1},
    "fusion/modal_pool.cu": {
        **dict.fromkeys(("lean_pool_forward", "lean_pool_backward", r"\dpool_forward", r"\dpool_backward"), 3),
        "pool_sums": 2,
    },
    "reduce/parts.cu": {"reduce_parts": 2},
}
#: Their rows are copied to shared memory; the backward ones read them from the caches.
PARKING = set(KERNELS) - {"distill/backward.cu", "distill/mixture_backward.cu", "fusion/mfd_loss.cu", "reduce/parts.cu"}
COMPLETE = [(source, arch) for arch in ARCHITECTURES for source in SOURCES]
#: The module is built for sm_90, or for more; the others take turns from source to source.
TURNS = list(zip(SOURCES, itertools.cycle((80, 100, 120, 89, 86)), strict=False))
CASES = (COMPLETE if os.environ.get("MFD_FAST_AOT") == "complete" else TURNS) if NVCC else []


def assert_good_machine_code(cubin: Path, source: str, arch: int) -> None:
    kernels = aot.resources(cubin)
    for pattern, count in KERNELS[source].items():
        assert sum(bool(re.search(pattern, name)) for name in kernels) >= count, pattern
    for name, (registers, stack) in kernels.items():
        assert stack == 0, name
        # Of 65536 registers: two blocks of 256 threads of the lean kernels, three of 128 where a warp has a row.
        lean = "distill_forward" in name and "Lb1EEE" in name
        assert registers <= (255 if not lean else 168 if "4Warp" in name else 128), name
    sass = aot.disassemble(cubin)
    seen = aot.inspect(kernels, sass)
    assert seen.local_instructions == 0
    if source != "reduce/parts.cu":  # which reads single values
        assert seen.load_widths["128"] > 0
        assert seen.store_widths["128"] > 0
    if source == "fusion/mfd_loss.cu":
        assert re.search(r"\bHMMA\.16816\.F32\.BF16\b", sass), "the products miss the tensor cores"
    if source in PARKING:
        assert re.search(r"\bLDGSTS\.E\.BYPASS\.128\b", sass), "rows are not parked by copies of 16 bytes"
    if source == "distill/forward.cu":
        assert bool(re.search(r"\bUCGABAR_(ARV|WAIT)\b", sass)) == (arch >= 90), "barriers of clusters"


@pytest.mark.rest
@pytest.mark.parametrize(("source", "arch"), CASES, ids=str)
def test_kernels_compile_without_spills(source: str, arch: int, tmp_path: Path) -> None:
    """Kept for the same sources and compiler."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    trees = (ROOT / "csrc", ROOT / "kernels" / "cuda", Path(__file__).resolve(), Path(aot.__file__).resolve())
    verdicts.kept("nvcc", trees, (source, arch, FLAGS, version), lambda: compiles_well(source, arch, tmp_path))


def compiles_well(source: str, arch: int, tmp_path: Path) -> None:
    cubin = tmp_path / f"{Path(source).stem}-{arch}.cubin"
    command = [NVCC, *FLAGS, f"-arch=sm_{arch}", "-Werror", "all-warnings", "-cubin"]
    done = subprocess.run([*command, CUDA / source, "-o", cubin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_good_machine_code(cubin, source, arch)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return aot.cubins_of(Path(mfd_fast._C.__file__), tmp_path_factory.mktemp("built"))


@pytest.mark.parametrize("source", SOURCES if NVCC else [])
def test_the_kernels_of_the_module_have_no_spills(source: str, built: list[Path]) -> None:
    """As they were built, for whichever architectures."""
    wanted = next(iter(KERNELS[source]))
    cubins = [cubin for cubin in built if any(re.search(wanted, name) for name in aot.resources(cubin))]
    assert cubins
    for cubin in cubins:
        assert_good_machine_code(cubin, source, int(re.search(r"\.sm_(\d+)\.cubin$", cubin.name)[1]))


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
