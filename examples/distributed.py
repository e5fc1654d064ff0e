"""Two processes: DDP, then FSDP2, with a checkpoint in the middle; the same losses as one process.

    python examples/distributed.py --help

Run plainly, this script starts itself four times, with torchrun where two processes are needed (gloo, on the CPU),
and prints the losses side by side: one process; DDP; FSDP2; FSDP2 that stops after half of the steps and goes on from
its checkpoint in new processes. The data are random numbers: nothing is learned that is worth it.

What a loss needs in several processes: PyTorch averages the gradients of the processes, so each divides its sum by
its own share of all counted rows. `normalizer=` takes that number; here some labels are ignored, and the processes
count differently.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mfd_fast as mfd

RUNS = {
    "one process": "one",
    "DDP": "ddp",
    "FSDP2": "fsdp",
    "FSDP2, stopped and resumed": "resume",
}
ROWS, CLASSES, SIZES = 64, 50, (32, 16)


class Student(nn.Module):
    """Two sensors, fused by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion = mfd.nn.ModalFusion(list(SIZES), 24, scoring="query")
        self.head = nn.Sequential(nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, CLASSES))

    def forward(self, sensors: list[Tensor]) -> Tensor:
        return self.head(self.fusion(sensors).pooled)


def batch(step: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """The same whole batch in every process; each takes its rows of it."""
    generator = torch.Generator().manual_seed(step)
    sensors = [torch.randn(ROWS, size, generator=generator) for size in SIZES]
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    labels[torch.rand(ROWS, generator=generator) < 0.3] = -100
    return sensors, torch.randn(ROWS, CLASSES, generator=generator), labels


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """The loss of the whole batch at each step."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = []
    for step in track(steps, "training", disable=rank > 0):
        sensors, teacher, labels = (part for part in batch(step))
        mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        counted = (labels[mine] != -100).sum()
        if world > 1:
            dist.all_reduce(counted)
        loss = mfd.distill_loss(
            model([x[mine] for x in sensors]),
            teacher[mine],
            labels[mine],
            temperature=2.0,
            soft_weight=0.7,
            hard_weight=0.3,
            normalizer=counted / world,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole = loss.detach() / world
        if world > 1:
            dist.all_reduce(whole)
        losses.append(whole.item())
    return losses


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Student()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind in ("fsdp", "resume"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole or sharded, as the parameters are. Not before a first step: it makes the optimizer's state."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def worker(kind: str, steps: int, folder: Path) -> None:
    """One process of one run. The run "resume" takes two calls, half of the steps each."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    log, checkpoint = folder / f"{kind}.json", folder / "checkpoint"
    done: list[float] = []
    if log.exists():  # the second call: go on
        done, loaded = json.loads(log.read_text()), states(model, optimizer)
        dcp.load(loaded, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    stop = steps // 2 if kind == "resume" and not done else steps
    losses = done + train(model, optimizer, range(len(done), stop))
    if kind == "resume" and not done:
        dcp.save(states(model, optimizer), checkpoint_id=checkpoint)
    if dist.is_initialized():
        dist.barrier()
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.write_text(json.dumps(losses))
    del model, optimizer  # DDP, freed after its process group, can wait for ever for that group's thread
    if dist.is_initialized():
        dist.destroy_process_group()


def main(steps: int = 40) -> dict[str, list[float]]:
    """The losses of each run."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in RUNS.items():
            print(name)
            launcher = [sys.executable, *(torchrun if kind != "one" else []), __file__]
            for _ in range(2 if kind == "resume" else 1):
                command = [*launcher, "--steps", str(steps), "--worker", kind, "--folder", folder]
                subprocess.run(command, check=True, env=environment)
            found[name] = json.loads(Path(folder, f"{kind}.json").read_text())
    return found


def show(found: dict[str, list[float]]) -> None:
    one = found["one process"]
    at = [0, len(one) // 2 - 1, len(one) // 2, len(one) - 1]
    table = Table(title="loss of the whole batch, and its largest relative difference from one process")
    for name in ("run", *(f"step {step}" for step in at), "difference"):
        table.add_column(name)
    for name, losses in found.items():
        apart = max(abs(a - b) / b for a, b in zip(losses, one, strict=True))
        table.add_row(name, *(f"{losses[step]:.6f}" for step in at), f"{apart:.0e}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--worker", choices=list(RUNS.values()), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.steps, arguments.folder)
    else:
        show(main(arguments.steps))
