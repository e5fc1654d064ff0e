"""`make gpu`: what a GPU can tell in nine minutes, in the order of its worth, and going on where the last call stopped.

Parts: facts (versions, ceilings), smoke (every op, every rung, against float64), speed (device time, host time, eager),
compare (torch.compile, Liger, CUDA graphs, launches), battery (the tests of both backends), streams (streams, capture,
more than 2**31 elements), sanitizer (compute-sanitizer behind a planted fault).

Into the folder of the results go journal.jsonl (a line for every item as it ends), results.json and report.txt (anew
after every part) and log.txt. Another call with the same folder, or with a copy of it as --before, goes on from there.

Exit status: 0 all is done and green, 1 something is red, 3 call again, 4 the GPU no longer answers.
`--device cpu` rehearses all of it without a GPU, small, with stand-ins.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import parts
import report
import staging
from journal import RED, Journal, last_line
from supervise import DeviceGoneError, Limits, Supervisor

ROOT = staging.ROOT
GREEN_STATUS, RED_STATUS, AGAIN, GONE = 0, 1, 3, 4
#: A part that has less of its time than this is not begun.
LEAST = 3.0
#: Of the log; what is before is dropped between two parts.
LOG_BYTES = 4 << 20
PREDICTIONS = ROOT / "docs" / "predictions.md"
PROBE = "import torch; torch.zeros(8, device='cuda').add_(1); torch.cuda.synchronize()"


def digest() -> str:
    """Names the state of everything that is built or run."""
    found = hashlib.sha256()
    for tree in ("CMakeLists.txt", "csrc", "kernels", "mfd_fast", "benchmarks", "tests"):
        for path in sorted([ROOT / tree] if (ROOT / tree).is_file() else (ROOT / tree).rglob("*")):
            if path.suffix in (".txt", ".py", ".h", ".cpp", ".cu", ".cuh"):
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


class Run:
    """One call: its time, its options, the folder that it shares with others."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.device, self.folder = asked, asked.device, asked.results
        self.begin = time.time()
        self.until = self.begin + 60 * asked.minutes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal, self.log = Journal(self.folder / "journal.jsonl"), self.folder / "log.txt"
        self.gone = ""
        self.notes: dict[str, list[str]] = {}
        self.spent: dict[str, float] = {}
        self.adopt()

    def adopt(self) -> None:
        """Earlier results of the same sources on the same kind of device are gone on with, others are set aside."""
        before = self.asked.before
        if before and (before / "journal.jsonl").exists() and not self.journal.path.exists():
            shutil.copyfile(before / "journal.jsonl", self.journal.path)
        self.journal.mend()
        sources = f"{digest()} {self.device}"
        said = [line["sources"] for line in self.journal.lines() if "sources" in line]
        if said and (self.asked.fresh or said[-1] != sources):
            self.journal.path.replace(self.journal.path.with_name("journal-of-other-sources.jsonl"))
            said = []
        if not said:
            self.journal.say(sources=sources)
        for line in self.journal.lines():
            if "spent" in line:
                self.spent[line["part"]] = self.spent.get(line["part"], 0.0) + line["spent"]

    def prepare(self) -> None:
        """The package laid out with a native module: one at hand, or one built here. Without it only Triton runs."""
        begin, why = time.time(), ""
        module = staging.module(self.device)
        if module is None:
            try:
                module = self.build()
            except Exception as error:
                why = f"the native module was not built: {last_line(error)}"
        staging.lay_out(module)
        if self.device == "cuda" and not why:
            try:
                staging.planted()
            except Exception as error:
                why = f"the planted fault was not compiled: {last_line(error)}"
        if why:
            self.journal.end("build", "native module", RED, why)
        else:
            self.journal.end("build", "native module", "green", seconds=round(time.time() - begin, 1))
        self.journal.plan("build", "all", 1)
        self.spend("build", time.time() - begin)
        self.write()

    def build(self) -> Path | None:
        """In a process of its own, so that what the compilers say is in the log."""
        with open(self.log, "ab") as log:
            command = [sys.executable, str(ROOT / "tests" / "gpu"), "--device", self.device, "--build"]
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True, timeout=max(self.left(), 1.0))
        return staging.module(self.device)

    def left(self) -> float:
        return self.until - time.time()

    def spend(self, part: str, seconds: float) -> None:
        self.spent[part] = self.spent.get(part, 0.0) + seconds
        self.journal.say(part=part, spent=round(seconds, 1))

    def is_done(self, part: str) -> bool:
        return self.check(part)["not_reached"] == 0

    def check(self, part: str) -> dict[str, Any]:
        shares = next((self.shares(p) for p in parts.PARTS if p.name == part), ("all",))
        return report.check_of(self.journal, part, shares, self.spent.get(part, 0.0), self.notes.get(part, []))

    def shares(self, part: parts.Part) -> tuple[str, ...]:
        return part.shares if self.device == "cuda" else part.rehearsal

    def run(self, wanted: Sequence[parts.Part]) -> None:
        """Every part within its share of the time that is left; what an early end leaves goes to those behind it."""
        open_parts = [part for part in wanted if not self.is_done(part.name)]
        scale = self.left() / max(sum(part.seconds for part in open_parts), 1e-9)
        end = time.time()
        for part in open_parts:
            end = min(end + scale * part.seconds, self.until)
            begin = time.time()
            if end - begin < min(LEAST, scale * part.seconds) / 2:
                continue
            try:
                self.supervise(part, end)
            except DeviceGoneError as error:
                self.gone = str(error)
            except Exception as error:
                traceback.print_exc()
                self.journal.end(part.name, "the part itself", RED, last_line(error), extra=True)
            spent = time.time() - begin
            self.spend(part.name, spent)
            check = self.check(part.name)
            print(f"gpu: {part.name:<10} {check['verdict']:<13} {spent:5.1f} s of {end - begin:5.1f} s", flush=True)
            self.write()
            if self.gone:
                print(f"gpu: STOPPED: {self.gone}", flush=True)
                return

    def supervise(self, part: parts.Part, until: float) -> None:
        self.cut_the_log()
        Supervisor(
            part.name,
            lambda share: parts.command(part, share, self.device, until, self.journal.path),
            {**staging.environment(self.device, emulate=part.tests is None), **self.commit()},
            self.journal,
            staging.HOME / "marks",
            self.log,
            Limits(until, part.patience),
            self.alive,
            staging.SITE,
            self.notes.setdefault(part.name, []),
        ).run(self.shares(part))

    def commit(self) -> dict[str, str]:
        return {"MFD_GPU_COMMIT": self.asked.commit} if self.asked.commit else {}

    def alive(self) -> bool:
        """A fresh process gets the GPU."""
        if self.device == "cpu":
            return True
        try:
            return subprocess.run([sys.executable, "-c", PROBE], capture_output=True, timeout=30).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def cut_the_log(self) -> None:
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.write_bytes(self.log.read_bytes()[-LOG_BYTES // 2 :])

    def write(self) -> list[str]:
        """results.json and report.txt anew; returns the report."""
        names = [name for name in ("build", *(part.name for part in parts.PARTS)) if self.journal.ended(name)]
        places = (str(ROOT), sys.prefix, str(Path.home()))
        found = report.evidence(self.journal, {name: self.check(name) for name in names}, places)
        report.save(found, self.folder / "results.json")
        if self.device == "cuda" and found["machine"]:
            report.save(found, ROOT / "benchmarks" / "results" / f"{found['machine']['name']}.json")
        said = report.lines(found, report.predictions(PREDICTIONS), self.gone)
        (self.folder / "report.txt").write_text("\n".join(said) + "\n", encoding="utf-8")
        return said

    def status(self, wanted: Sequence[parts.Part]) -> int:
        checks = [self.check(name) for name in ("build", *(part.name for part in wanted))]
        if self.gone:
            return GONE
        if any(check["red"] for check in checks):
            return RED_STATUS
        return GREEN_STATUS if all(check["not_reached"] == 0 for check in checks) else AGAIN


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in parts.PARTS]
    top.add_argument("--part", action="append", choices=names, help="only this one (may be repeated)")
    top.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    top.add_argument("--minutes", type=float, default=9.0, help="of this call")
    top.add_argument("--results", type=Path, help="folder; default build/gpu/results")
    top.add_argument("--before", type=Path, help="folder of earlier results to go on from")
    top.add_argument("--commit", help="of the sources, where there is no repository to ask")
    top.add_argument("--fresh", action="store_true", help="forget what the folder has")
    top.add_argument("--build", action="store_true", help="only build the native module for this interpreter")
    top.add_argument("--arch", help="of --build, where there is no GPU to ask; 90 is Hopper")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(argv)
    if asked.build:
        print(staging.build(asked.device, asked.arch))
        return 0
    asked.results = (asked.results or staging.HOME / "results").resolve()
    wanted = [part for part in parts.PARTS if asked.part is None or part.name in asked.part]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = Run(asked)
    try:
        run.prepare()
        run.run(wanted)
    except KeyboardInterrupt:
        run.gone = run.gone or "this call was ended from outside"
    print("\n".join(run.write()))
    return run.status(wanted)


if __name__ == "__main__":
    sys.exit(main())
