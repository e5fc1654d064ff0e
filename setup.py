"""Build of mfd_fast: pure Python plus one native module, compiled by CMake and Ninja.

Environment variables read here:

``MFD_FAST_NATIVE``      ``1``: fail when the native module cannot be built; ``0``: never build it.
``MFD_FAST_SANITIZE``    sanitizers for the native module, as in ``-fsanitize=`` (``address,undefined``).
``MFD_FAST_CUDA``        ``1``: fail when nvcc is not found; ``0``: leave the CUDA kernels out.
``MFD_FAST_CUDA_ARCHS``  CUDA architectures, separated by semicolons (``90;100``).
``CXX``, ``CUDACXX``, ``CMAKE_ARGS``  as usual.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
NATIVE = "mfd_fast._C"
SDIST_TREES = ("csrc", "kernels", "benchmarks", "tests", "docs", "examples")
SDIST_FILES = ("CMakeLists.txt", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md", ".clang-format", "constraints.txt")
SDIST_FILES += ("constraints-trainers.txt",)
SDIST_SUFFIXES = (".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".md", ".txt", ".css", ".svg", ".png")


def find_compiler() -> list[str] | None:
    """The C++ compiler command, or None when there is none that links a program."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if not command or shutil.which(command[0]) is None:
            continue
        with tempfile.TemporaryDirectory() as tmp:
            source = Path(tmp, "probe.cpp")
            source.write_text("int main() { return 0; }\n")
            probe = subprocess.run([*command, str(source), "-o", str(source.with_suffix(""))], capture_output=True)
            if probe.returncode == 0:
                return command
    return None


def find_nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, a toolkit, or the PyPI packages nvidia-cuda-nvcc, -runtime and -cccl."""
    named = os.environ.get("CUDACXX")
    if named:
        return named
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages = [Path(sysconfig.get_path("purelib"), "nvidia", "cu13")]
    for nvcc in [*(t / "bin" / "nvcc" for t in toolkits), *(p / "bin" / "nvcc" for p in packages)]:
        if nvcc.is_file():
            return str(nvcc)
    return shutil.which("nvcc")


def why_pure() -> str | None:
    """Why only the pure-Python package is installed, or None when the native module is built."""
    if os.environ.get("MFD_FAST_NATIVE") == "0":
        return "MFD_FAST_NATIVE=0 is set"
    if find_compiler() is None:
        return f"no working C++ compiler was found ({os.environ.get('CXX') or 'c++, g++, clang++'}; Debian: g++)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the headers of this Python are missing (Python.h; Debian: python3-dev)"
    return None


PURE = why_pure()
PURE_SENTENCE = (
    f"mfd_fast: the native CPU module is left out because {PURE}; the other backends work, "
    "and installing again builds it."
)
if PURE and os.environ.get("MFD_FAST_NATIVE") == "1":
    sys.exit(f"mfd_fast: MFD_FAST_NATIVE=1 is set, but {PURE}.")


def tool(package: str, directory: str) -> str:
    """A build tool from its PyPI package, or from the system."""
    try:
        found = shutil.which(package, path=getattr(__import__(package), directory))
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(package)
    if found is None:
        sys.exit(f"mfd_fast: {package} is needed to build the native module: pip install {package}.")
    return found


def to_terminal(text: str) -> None:
    """Write where the user sees it although pip keeps the output of a build to itself."""
    try:
        if not sys.stderr.isatty():
            with open("/dev/tty", "w") as terminal:
                terminal.write(text)
    except OSError:  # there is none
        pass


def say(sentence: str) -> None:
    """One sentence into the output of the build and onto the terminal."""
    print(sentence, file=sys.stderr, flush=True)
    to_terminal(f"\n{sentence}\n")


def compile_with_progress(command: list[str], environ: dict[str, str]) -> None:
    """Run Ninja; its lines go to the output of the build, their count to the terminal, at most once a second."""
    shown, started = 0.0, time.monotonic()
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as ninja:
        assert ninja.stdout is not None
        for line in ninja.stdout:
            print(line, end="", flush=True)
            count, now = re.match(r"\[(\d+)/(\d+)\]", line), time.monotonic()
            if count and count[1] != "0" and now - shown > 1:
                to_terminal("\r" if shown else "\n")
                shown = now
                to_terminal(f"mfd_fast: step {count[1]} of {count[2]} of the native module, {now - started:.0f} s ")
    if ninja.returncode:
        raise subprocess.CalledProcessError(ninja.returncode, command)
    to_terminal(f"\rmfd_fast: the native module is compiled, {time.monotonic() - started:.0f} s {' ' * 24}\n")


class BuildNative(build_ext):
    """Runs CMake once and copies the module it makes."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build incrementally in build/native-<abi>, one build at a time."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        abi = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
        sanitize = os.environ.get("MFD_FAST_SANITIZE", "")
        build = ROOT / "build" / "-".join(filter(None, ["native", abi, sanitize.replace(",", "-")]))
        try:
            build.mkdir(parents=True, exist_ok=True)
        except OSError:
            build = Path(self.build_temp).resolve()
            build.mkdir(parents=True, exist_ok=True)
        cuda = {"0": "OFF", "1": "ON"}.get(os.environ.get("MFD_FAST_CUDA", ""), "AUTO")
        nvcc = find_nvcc() if cuda != "OFF" else None
        if nvcc:
            archs = os.environ.get("MFD_FAST_CUDA_ARCHS") or "six architectures, which takes minutes"
            say(f"mfd_fast: CUDA kernels are compiled for {archs} ({nvcc}); MFD_FAST_CUDA=0 leaves them out.")
        cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMFD_FAST_SANITIZE={sanitize}",
            f"-DMFD_FAST_CUDA={cuda}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
            f"-DMFD_FAST_CUDA_ARCHS={os.environ.get('MFD_FAST_CUDA_ARCHS', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        compiler = find_compiler()
        environ = {**os.environ, "CXX": shlex.join(compiler)} if compiler else dict(os.environ)
        with open(build.with_name(build.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.forget_stale_cache(build, compiler)
            subprocess.run(configure, check=True, env=environ)
            jobs = [f"-j{self.parallel}"] if self.parallel else []
            compile_with_progress([cmake, "--build", str(build), *jobs], environ)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            shutil.copy2(build / "_C.so", partial)
            # A rename leaves a running process its mapped file.
            os.replace(partial, target)

    @staticmethod
    def forget_stale_cache(build: Path, compiler: list[str] | None) -> None:
        """Start afresh when the tree has moved or the compiler has changed: CMake refuses both."""
        stamp, now = build / "configured-for", f"{ROOT}\n{shlex.join(compiler or [])}\n"
        if (build / "CMakeCache.txt").exists() and not (stamp.exists() and stamp.read_text() == now):
            shutil.rmtree(build)
            build.mkdir(parents=True)
        stamp.write_text(now)


class BuildPython(build_py):
    """Says, once per build, when the native module is left out."""

    def run(self) -> None:
        """Copy the Python files; those of an earlier build must not come along."""
        if PURE:
            say(PURE_SENTENCE)
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class SourceArchive(sdist):
    """Carries everything that building and testing need."""

    def make_distribution(self) -> None:
        """Add the native sources, the tests and the documents."""
        extra = [ROOT / name for name in SDIST_FILES]
        for tree in SDIST_TREES:
            extra += [path for path in sorted((ROOT / tree).rglob("*")) if path.suffix in SDIST_SUFFIXES]
        self.filelist.extend(path.relative_to(ROOT).as_posix() for path in extra if path.is_file())
        self.filelist.remove_duplicates()
        super().make_distribution()


setup(
    packages=[
        *find_packages(include=["mfd_fast", "mfd_fast.*"]),
        "mfd_fast.kernels.triton",
        *(f"mfd_fast.kernels.triton.{name}" for name in find_packages("kernels/triton")),
    ],
    package_dir={"mfd_fast.kernels.triton": "kernels/triton"},
    package_data={"mfd_fast": ["py.typed"]},
    ext_modules=[] if PURE else [Extension(NATIVE, sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "sdist": SourceArchive},
)
