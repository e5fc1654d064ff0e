"""The sdist, the wheel, the editable install and the pure-Python install, each imported from elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import pty
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mfd_fast import backends, cli

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCES = ("build", "dist", "*.so", "*.egg-info", "__pycache__", ".git", ".venv", ".*_cache", ".hypothesis")
SITE = sysconfig.get_path("purelib")

#: Most of it builds: an sdist, wheels, installs.
pytestmark = pytest.mark.rest

LOSS = """
import torch, mfd_fast as mfd
student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
"""


def run(*command: object, ok: bool = True, cwd: Path = ROOT, **environ: str) -> str:
    """Output of a command; its exit status must be zero exactly when ``ok``."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MFD_FAST_", "PYTHON", "TRITON_"))}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environ}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a build does not write to the terminal of the tests
    )
    assert (done.returncode == 0) == ok, f"exit status {done.returncode}\n{done.stdout}"
    return done.stdout


def pip(verb: str, tree: Path, out: Path, *more: str, ok: bool = True, **environ: str) -> str:
    """One pip command on a source tree, with the build tools of this environment; without CUDA, unless asked."""
    environ = {"MFD_FAST_CUDA": "0", **environ}
    where = {"wheel": "--wheel-dir", "install": "--target"}[verb]
    options = ("--no-deps", "--no-build-isolation", "--verbose", where, str(out), *more)
    with locked(tree.with_name(tree.name + ".lock")):
        return run(sys.executable, "-m", "pip", verb, *options, tree, ok=ok, cwd=out.parent, **environ)


def python(path: Path, cwd: Path, code: str, **environ: str) -> str:
    """Output of ``code`` in a new interpreter that sees ``path`` before the installed packages."""
    # -S: an editable install in this environment must stay out of sight.
    paths = os.pathsep.join([str(path), SITE])
    return run(sys.executable, "-S", "-W", "error", "-c", code, cwd=cwd, PYTHONPATH=paths, **environ)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory shared by the workers of pytest-xdist, so that each build is made once."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "packaging"
    (path / "elsewhere").mkdir(parents=True, exist_ok=True)
    return path


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """``path`` after ``make(path)`` has filled it, by this worker or another."""
    with locked(path.with_name(path.name + ".made-lock")):
        stamp = path.with_name(path.name + ".made")
        if not stamp.exists():
            make(path)
            stamp.touch()
    return path


@pytest.fixture(scope="session")
def elsewhere(space: Path) -> Path:
    """An empty working directory."""
    return space / "elsewhere"


@pytest.fixture(scope="session")
def unpacked(space: Path) -> Path:
    """The sdist of this checkout, unpacked: every other build starts from it."""

    def make(path: Path) -> None:
        copy = space / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))
        code = f"from setuptools import build_meta; build_meta.build_sdist({str(space)!r})"
        run(sys.executable, "-c", code, cwd=copy)
        (archive,) = space.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(path, filter="data")

    (tree,) = [path for path in made(space / "unpacked", make).iterdir() if path.is_dir()]
    return tree


@pytest.fixture(scope="session")
def wheel(space: Path, unpacked: Path) -> Path:
    """The wheel of the sdist, with the native module."""

    def make(path: Path) -> None:
        lib = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        stale = unpacked / "build" / lib / "mfd_fast" / "removed.py"
        stale.parent.mkdir(parents=True)
        stale.write_text("")
        pip("wheel", unpacked, path, MFD_FAST_NATIVE="1")

    (path,) = made(space / "wheels", make).glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(space: Path, wheel: Path) -> Path:
    """Directory with the installed wheel."""
    return made(space / "installed", lambda path: pip("install", wheel, path))


@pytest.fixture
def broken(installed: Path, tmp_path: Path) -> Path:
    """A private copy of the installed wheel, to damage."""
    return Path(shutil.copytree(installed, tmp_path / "broken"))


@pytest.fixture(scope="session")
def pure(space: Path, unpacked: Path, wheel: Path) -> Path:
    """Wheel and log of a build that finds no compiler, in a tree that was built with one before."""

    def make(path: Path) -> None:
        log = pip("wheel", unpacked, path, PATH="/nonexistent", CXX="")
        (path / "log").write_text(log)

    return made(space / "pure", make)


@pytest.mark.quick
def test_the_sdist_carries_what_building_and_testing_need(unpacked: Path) -> None:
    suffixes = (".py", ".h", ".cpp", ".cu", ".cuh", ".typed", ".md", ".css", ".svg")
    for tree in ("mfd_fast", "csrc", "kernels", "tests", "benchmarks", "docs", "examples"):
        sources = ROOT / tree
        for path in sources.rglob("*"):
            hidden = any(path.match(p) or f"/{p}/" in str(path.relative_to(ROOT)) for p in NOT_SOURCES)
            if path.is_file() and not hidden and path.suffix in suffixes:
                assert (unpacked / path.relative_to(ROOT)).is_file(), path
    for name in ("CMakeLists.txt", "Makefile", "constraints.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"):
        assert (unpacked / name).is_file(), name


def test_the_wheel_owns_one_top_level_name(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mfd_fast"}
    names = zipfile.ZipFile(wheel).namelist()
    device_code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels" / "triton").rglob("*.py")}
    assert len(device_code) > 20
    assert {f"mfd_fast/{name}" for name in device_code} <= set(names)
    assert "mfd_fast/py.typed" in names
    assert "mfd_fast/removed.py" not in names, "a file of an earlier build came along"
    assert not wheel.name.endswith("none-any.whl")


PROBE = """
import contextlib, importlib.metadata, io, json, sys
from pathlib import Path
import torch, mfd_fast as mfd
triton_imported = any(name.split(".")[0] == "triton" for name in sys.modules)
import mfd_fast._C
from mfd_fast.cli import main
with contextlib.redirect_stdout(io.StringIO()) as env:
    status = main(["env"])
print(json.dumps({
    "files": [mfd.__file__, mfd_fast._C.__file__],
    "versions": [mfd.__version__, importlib.metadata.version("mfd-fast")],
    "triton_imported": triton_imported,
    "loss": mfd.distill_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), backend="cpu").item(),
    "env": [status, env.getvalue()],
    "openmp": sorted({x.split()[-1] for x in Path("/proc/self/maps").read_text().splitlines() if "omp" in x}),
}))
"""


@pytest.fixture(scope="session")
def facts(installed: Path, elsewhere: Path) -> dict[str, Any]:
    """What a new interpreter in another directory sees of the installed wheel."""
    facts: dict[str, Any] = json.loads(python(installed, elsewhere, PROBE, MFD_FAST_BACKEND="reference"))
    return facts


def test_the_installed_wheel_runs_from_another_directory(facts: dict[str, Any], installed: Path) -> None:
    assert all(Path(file).is_relative_to(installed) for file in facts["files"])
    assert len(set(facts["versions"])) == 1
    assert facts["loss"] > 0


def test_env_describes_the_machine(facts: dict[str, Any], installed: Path) -> None:
    status, said = facts["env"]
    assert status == 0
    for word in ("mfd_fast", "Python", "torch", "triton", "processor", "CPU ISA", "reference", "MFD_FAST_BACKEND"):
        assert word in said
    assert "mfd-fast = mfd_fast.cli:main" in next(installed.glob("*.dist-info/entry_points.txt")).read_text()


@pytest.mark.quick
def test_commands_name_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda _: None)
    assert cli.main(["demo"]) == 1
    assert "pip install 'mfd-fast[demo]'" in capsys.readouterr().err
    backends.forget_availability()
    assert cli.main(["env"]) == 0
    backends.forget_availability()
    assert "backend reference" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["env", "--nonsense"])


def test_the_benchmark_runs_from_the_installed_wheel(installed: Path, elsewhere: Path) -> None:
    sizes = "'--rows', '16', '--classes', '40', '--seconds', '0.01', '--against', 'eager'"
    code = f"""
import mfd_fast.bench.ceilings as ceilings
ceilings.MEBIBYTE = 1 << 10
from mfd_fast.cli import main
assert main(['bench', 'distill_loss', {sizes}]) == 0
import mfd_fast
print(mfd_fast.__file__)
"""
    said = python(installed, elsewhere, code)
    assert "mfd_fast (cpu) takes" in said
    assert str(installed) in said


def test_importing_needs_no_triton(facts: dict[str, Any], installed: Path, elsewhere: Path) -> None:
    assert not facts["triton_imported"]
    blocked = "import sys; sys.modules['triton'] = None" + LOSS + "print(mfd.distill_loss(student, teacher).item())"
    assert float(python(installed, elsewhere, blocked)) > 0


def test_the_editable_install_works_from_another_directory(
    unpacked: Path, wheel: Path, tmp_path: Path, elsewhere: Path
) -> None:
    target = tmp_path / "editable"
    pip("install", unpacked, target, "--editable")
    code = f"""
import site, sys
site.addsitedir({str(target)!r})
sys.path.append({SITE!r})
import mfd_fast, mfd_fast._C, mfd_fast.kernels
assert "mfd_fast.kernels" in sys.modules
import importlib.util
print(mfd_fast.__file__, mfd_fast._C.__file__, importlib.util.find_spec("mfd_fast.kernels.triton.rows.scale").origin)
assert importlib.util.find_spec("kernels") is None
"""
    # -S: the environment's own editable install must stay out of sight.
    said = run(sys.executable, "-I", "-S", "-c", code, cwd=elsewhere)
    assert said.count(str(unpacked)) == 3
    assert str(unpacked / "kernels" / "triton" / "rows" / "scale.py") in said


@pytest.mark.quick
def test_a_package_named_kernels_is_not_shadowed_in_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import sys; assert sys.path[0] == ''; import kernels, mfd_fast; print(kernels.__file__)"
    assert str(tmp_path) in python(tmp_path, ROOT, code)


SENTENCE = (
    LOSS
    + """
assert mfd.distill_loss(student, teacher).item() > 0
assert mfd.distill_loss(student, teacher, backend="reference").item() > 0
try:
    mfd.distill_loss(student, teacher, backend="cpu")
except mfd.BackendError as error:
    print(error)
from mfd_fast.cli import main
main(["env"])
"""
)


def assert_cpu_is_refused(said: str) -> None:
    first = said.splitlines()[0]
    assert re.match(r"distill_loss: backend 'cpu' cannot run \(.+\): \w.{20,}", first), said
    assert "Traceback" not in said


@pytest.mark.parametrize("damage", ["missing", "text"])
def test_a_broken_native_module_leaves_the_rest(broken: Path, elsewhere: Path, damage: str) -> None:
    (module,) = broken.glob("mfd_fast/_C*.so")
    if damage == "missing":
        module.unlink()
    else:
        module.write_bytes(b"not a library")
    assert_cpu_is_refused(python(broken, elsewhere, SENTENCE))


def test_without_a_compiler_the_install_is_pure_python(pure: Path, tmp_path: Path, elsewhere: Path) -> None:
    (wheel,) = pure.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    log = (pure / "log").read_text()
    assert log.count("left out because no working C++ compiler") == 1, log
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert_cpu_is_refused(python(tmp_path, elsewhere, SENTENCE))


def on_a_terminal(*command: object, **environ: str) -> str:
    """What a person sees of a command that is run in a terminal of its own."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(str(command[0]), list(map(str, command)), {**os.environ, **environ})
    seen = b""
    with contextlib.suppress(OSError):  # the terminal is closed
        while part := os.read(terminal, 4096):
            seen += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, seen.decode()
    return seen.decode()


def test_pip_shows_the_progress_of_the_build_and_what_is_left_out(unpacked: Path, wheel: Path, tmp_path: Path) -> None:
    (unpacked / "csrc" / "bindings" / "module.cpp").touch()
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, unpacked)
    with locked(unpacked.with_name(unpacked.name + ".lock")):
        seen = on_a_terminal(*pip, MFD_FAST_CUDA="0", MFD_FAST_NATIVE="1")
        assert re.search(r"mfd_fast: step 1 of \d+ of the native module, \d+ s", seen), seen
        assert re.search(r"mfd_fast: the native module is compiled, \d+ s", seen), seen
        assert "left out" not in seen
        seen = on_a_terminal(*pip, MFD_FAST_NATIVE="0")
    assert "the native CPU module is left out because MFD_FAST_NATIVE=0 is set" in seen


def test_the_native_module_can_be_demanded(unpacked: Path, tmp_path: Path) -> None:
    log = pip("wheel", unpacked, tmp_path / "out", ok=False, PATH="/nonexistent", CXX="", MFD_FAST_NATIVE="1")
    assert "MFD_FAST_NATIVE=1 is set, but no working C++ compiler was found" in log


def test_a_compile_error_is_not_hidden(unpacked: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(unpacked, tree, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    for source in (tree / "csrc").rglob("*.cpp"):
        source.write_text('#error "broken on purpose"\n')
    assert "broken on purpose" in pip("wheel", tree, tmp_path / "out", ok=False)


def test_the_native_module_shares_the_threads_of_torch_and_links_nothing_else_of_it(
    facts: dict[str, Any], installed: Path
) -> None:
    (module,) = installed.glob("mfd_fast/_C*.so")
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "--dynamic", "--wide", module))
    assert "libgomp.so.1" in needed
    assert not [name for name in needed if re.match(r"lib(torch|c10|cuda|python)", name)]
    assert len(facts["openmp"]) == 1


def test_wide_instructions_stay_in_their_files(unpacked: Path, wheel: Path) -> None:
    """A weak symbol of an ISA file could replace the baseline's copy of the same inline function."""
    objects = [
        path
        for isa in ("avx2", "avx512", "avx512_bf16")
        for path in unpacked.glob(f"build/native-*/**/isa/{isa}.cpp.o")
    ]
    assert len(objects) == (3 if platform.machine() == "x86_64" else 0)
    for path in objects:
        weak = re.findall(r"^\S+ [VWu] (.+)$", run("nm", "--demangle", "--defined-only", path), re.MULTILINE)
        assert not weak, f"{path.name}: {weak}"


@pytest.mark.quick
def test_native_sources_are_free_of_torch() -> None:
    for tree in ("csrc", "kernels"):
        for path in (ROOT / tree).rglob("*"):
            if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py"):
                text = path.read_text()
                assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', text), path
                assert not re.search(r"^\s*(import|from) torch\b", text, re.MULTILINE), path
                assert ("pybind11" in text) <= ("bindings" in path.parts), path


def sources() -> list[Path]:
    suffixes = (".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".yml", ".yaml", ".txt")
    hidden = {"build", "dist", "results", "__pycache__"}
    found = []
    for directory, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in hidden and (not f.startswith(".") or f in (".ci", ".github"))]
        found += [Path(directory, name) for name in files if name.endswith(suffixes) or name == "Makefile"]
    return found


@pytest.mark.quick
def test_files_are_short_and_name_no_machine() -> None:
    assert len(sources()) > 20
    machine = re.compile(r"(?<![\w.])/(root|home|work|opt|Users)/")
    for path in sources():
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path} has more than 500 lines"
        found = machine.search(text) if path != Path(__file__).resolve() else None
        assert found is None, f"{path} names a place on one machine: {found}"
        conflict = re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE)
        assert conflict is None, f"{path} keeps both sides of a conflict: {conflict}"
