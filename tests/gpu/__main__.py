"""`make gpu`: everything that needs a GPU, in calls of less than 9 minutes, each going on where the last one stopped.

Parts: build (the native module for this GPU), battery-cuda and battery-triton (the battery's tests of each backend, on
the device), special (tests/gpu: more than 2**31 elements, streams, graphs, torch.compile, every rung, a second
device), sanitizer (compute-sanitizer), bench (the suite `gpu`). Whatever is done for this state of the sources is kept
in build/gpu and not done again. After each part benchmarks/results/<gpu>-<date>-<commit>.json is written anew.

Exit status: 0 all parts are done and green, 1 something is red, 3 call again.
`--device cpu` rehearses all of it without a GPU, small, with the emulator and the interpreter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sanitizer
import shares
import staging

ROOT = staging.ROOT
#: Seconds that the last workload of the benchmark, or the last test, may take beyond the time of the call.
SLACK = {"bench": 150.0, "battery": 20.0}
#: Seconds without which no tool of compute-sanitizer is started.
ENOUGH = 200.0
#: Of tests in a rehearsal.
FEW = 24


def digest() -> str:
    """Names the state of everything that is built or run."""
    found = hashlib.sha256()
    for tree in ("CMakeLists.txt", "csrc", "kernels", "mfd_fast", "benchmarks", "tests"):
        for path in sorted([ROOT / tree] if (ROOT / tree).is_file() else (ROOT / tree).rglob("*")):
            if path.suffix in (".txt", ".py", ".h", ".cpp", ".cu", ".cuh"):
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


class Run:
    """One call: its time, its options, the state that it shares with other calls."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.device = asked, asked.device
        self.until = time.time() + 60 * asked.minutes
        self.folder = staging.HOME / f"{digest()}-{self.device}"
        if asked.fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "checks.json"
        self.checks: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def left(self) -> float:
        return self.until - time.time()

    def keep(self, part: str, **said: Any) -> None:
        self.checks[part] = {**self.checks.get(part, {}), **said}
        self.file.write_text(json.dumps(self.checks, indent=1))

    def build(self, part: str) -> None:
        log = self.folder / "build.log"
        begin, out, err = time.time(), os.dup(1), os.dup(2)
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                facts = staging.build(self.device)
                verdict: dict[str, Any] = {"verdict": "green", **facts}
            except (subprocess.CalledProcessError, RuntimeError, OSError, ImportError) as error:
                verdict = {"verdict": "red", "why": f"{type(error).__name__}: {error}"}
            finally:
                os.dup2(out, 1)
                os.dup2(err, 2)
        if verdict["verdict"] == "red":
            print(log.read_text(errors="replace")[-6000:])
        self.keep(part, done=verdict["verdict"] == "green", seconds=round(time.time() - begin), **verdict)

    def tests(self, part: str) -> None:
        """Those of a backend, or those of tests/gpu."""
        backend = part.removeprefix("battery-") if part.startswith("battery-") else None
        several = self.asked.processes if backend else 1  # tests/gpu may need the whole memory
        rehearsal = self.device == "cpu"
        begin = time.time()
        found = shares.run(
            self.folder / part,
            self.device,
            self.until - SLACK["battery"],
            several,
            backend=backend,
            first=FEW if rehearsal else None,
        )
        failed = {**found.broken, **found.failed}
        if not found.done and not failed:  # not even the tests were collected
            failed = {f"no test ran, see {part}/0.log": (self.folder / part / "0.log").read_text()[-3000:]}
        self.keep(
            part,
            done=found.left == 0,
            verdict="red" if failed else "green" if found.left == 0 else "not done",
            tests=found.total,
            passed=len(found.passed),
            failed=dict(sorted(failed.items())[:50]),
            failures=len(failed),
            seconds=round(self.checks.get(part, {}).get("seconds", 0) + time.time() - begin),
        )

    def sanitizer(self, part: str) -> None:
        tools = dict(self.checks.get(part, {}).get("tools", {}))
        for tool in sanitizer.TOOLS:
            enough = self.device == "cpu" or self.left() > ENOUGH
            if tool not in tools and enough:
                tools[tool] = sanitizer.run(tool, self.device, self.left())
        green = all(said["verdict"] == "green" for said in tools.values())
        self.keep(part, done=len(tools) == len(sanitizer.TOOLS), verdict="green" if green else "red", tools=tools)

    def bench(self, part: str) -> None:
        rehearsal, file = self.device == "cpu", self.folder / "bench.json"
        minutes = (self.left() - (0 if rehearsal else SLACK["bench"])) / 60
        if minutes < 0.5:
            return
        command = [sys.executable, "-m", "benchmarks", "--resume", "--json", file, "--minutes", f"{minutes:.2f}"]
        command += ["--quick", "--only", "64x100", "--against", "eager"] if rehearsal else ["--suite", "gpu"]
        with open(self.folder / "bench.log", "ab") as log:
            done = subprocess.run(
                list(map(str, command)),
                cwd=staging.SITE,
                env=staging.environment(self.device),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        found = json.loads(file.read_text()) if file.exists() else {"results": [], "left_out": []}
        late = [x["name"] for x in found["left_out"] if x["reason"].startswith("the suite's time")]
        red = {
            f"{result['workload']['name']}: {m['name']}": m["red"]
            for result in found["results"]
            for m in result["measurements"]
            if m["gate"] == "red"
        }
        ours = [name for name in red if ": mfd_fast:" in name]
        wrong = bool(ours) or not found["results"] or done.returncode not in (0, 1, 2)
        self.keep(part, done=file.exists() and not late, verdict="red" if wrong else "green", red=red, left=late)

    def evidence(self) -> None:
        folders = [self.asked.results] if self.asked.results else []
        if self.device == "cuda":
            folders.append(ROOT / "benchmarks" / "results")
        command = [sys.executable, ROOT / "tests" / "gpu" / "evidence.py", "--checks", self.file, "--root", ROOT]
        command += ["--bench", self.folder / "bench.json", "--device", self.device]
        command += [word for folder in folders or [self.folder] for word in ("--out", folder)]
        command += ["--commit", self.asked.commit] if self.asked.commit else []
        done = subprocess.run(
            list(map(str, command)),
            cwd=staging.SITE,
            env=staging.environment(self.device),
            capture_output=True,
            text=True,
        )
        print(done.stdout.strip() if done.returncode == 0 else done.stderr[-3000:])


PARTS: dict[str, Callable[[Run, str], None]] = {
    "build": Run.build,
    "battery-cuda": Run.tests,
    "special": Run.tests,
    "sanitizer": Run.sanitizer,
    "battery-triton": Run.tests,
    "bench": Run.bench,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: every part that is not done")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="of this call")
    parser.add_argument("--processes", type=int, default=max(min((os.cpu_count() or 2) // 2, 8), 1))
    parser.add_argument("--commit", help="of the sources, where there is no repository to ask")
    parser.add_argument("--results", type=Path, help="write the evidence here too")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier calls have done")
    run = Run(parser.parse_args())
    if run.checks.get("build", {}).get("done"):
        staging.lay_out(staging.native(run.device) / "_C.so")
    for part, work in PARTS.items():
        wanted = run.asked.part is None or part in run.asked.part
        if not wanted or run.checks.get(part, {}).get("done") or run.left() < 30:
            continue
        if part != "build" and not run.checks.get("build", {}).get("done"):
            run.build("build")
            if not run.checks["build"]["done"]:
                break
        work(run, part)
        print(summary(part, run.checks.get(part, {})), flush=True)
        if run.checks["build"]["done"]:
            run.evidence()
    wanted = run.asked.part or list(PARTS)
    for part in wanted:
        print(summary(part, run.checks.get(part, {})))
    said = [run.checks.get(part, {}) for part in wanted]
    if any(one.get("verdict") == "red" for one in said):
        return 1
    return 0 if all(one.get("done") for one in said) else 3


def summary(part: str, said: dict[str, Any]) -> str:
    state = said.get("verdict", "not begun") + ("" if said.get("done") or not said else ", call again")
    counts = f", {said['passed']} of {said['tests']} tests passed" if "tests" in said else ""
    counts += f", {said['failures']} failed" if said.get("failures") else ""
    names = "".join(f"\n    {name}" for name in list(said.get("failed", {}))[:10])
    reason = f": {said['why']}" if said.get("why") else ""
    return f"gpu: {part:<15} {state}{counts}{reason}{names}"


if __name__ == "__main__":
    sys.exit(main())
