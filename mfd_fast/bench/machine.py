"""What a measurement ran on: processor, clock, threads, instruction set, devices, versions, commit, load."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__

VARIABLES = ("MFD_FAST_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "ATEN_", "TORCHINDUCTOR_")
PEERS = ("liger-kernel", "trl", "fla-core", "speculators", "cut-cross-entropy", "torchdistill")


def facts(device: torch.device) -> dict[str, Any]:
    """A JSON object; what cannot be known is None."""
    from ..backends import cpu

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock_mhz": clock_mhz(),
        "last_level_cache_bytes": last_level_cache_bytes(torch.device("cpu")),
        "isa": cpu.isa() if cpu.available() is None else None,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "environment": {
            name: "a path" if os.sep in value else value  # whose it is does not matter
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES)
        },
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "mfd_fast": __version__,
        "peers": {name: version(name) for name in PEERS},
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


class DeviceLostError(RuntimeError):
    """A kernel has left this process without its GPU; whatever it does there fails from now on."""


def is_lost(device: torch.device) -> bool:
    """An illegal access or a failed assertion of a kernel: CUDA refuses everything that comes after it."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


class Neighbours:
    """How much of the processors other processes take while this one measures."""

    def __init__(self) -> None:
        self.begin = self._now()

    def share(self) -> float | None:
        """Between 0 and 1, since the beginning; None where the system does not tell."""
        now = self._now()
        if now is None or self.begin is None or now[1] <= self.begin[1]:
            return None
        busy, total, own = (b - a for a, b in zip(self.begin, now, strict=True))
        return round(max(0.0, busy - own) / total, 3)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: busy and all of every processor, and this process with its children."""
        try:
            ticks = [int(x) for x in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        idle, rate = ticks[3] + ticks[4], os.sysconf("SC_CLK_TCK")
        return (sum(ticks) - idle) / rate, sum(ticks) / rate, sum(os.times()[:4])


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor() or platform.machine()


def clock_mhz() -> float | None:
    """The fastest core's clock now, as the kernel sees it (a virtual machine may show a nominal one)."""
    return max(map(float, _cpuinfo("cpu MHz")), default=None)


def last_level_cache_bytes(device: torch.device) -> int:
    """32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) * (1024 if match[2] == "K" else 1024**2))
    return max(sizes, default=32 * 1024**2)


def commit() -> str | None:
    """Commit of the checkout that this package is in, with ``-dirty``; None for an installed package."""
    return _output(
        "git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"
    )


def slug(found: dict[str, Any]) -> str:
    """``amd-epyc-2026-11-24-0123456789``: name of a result file."""
    name = re.sub(r"\([^)]*\)|\b(cpu|processor|\d+-core)\b", "", (found.get("gpu") or found["cpu"]).lower())
    parts = re.sub(r"[^a-z0-9]+", "-", name).strip("-"), found["date"][:10], found["commit"] or found["mfd_fast"]
    return "-".join(parts)


def _cpuinfo(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(key)]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
