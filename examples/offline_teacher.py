"""An offline teacher: its top-k log-probabilities are stored once, then the student is trained without it.

    python examples/offline_teacher.py --help

The text is real and comes with Python: the language reference in `pydoc_data.topics`, about 100,000 words. The task
is to predict the next word from the eight before it. The teacher reads the text once and leaves, for every place, the
K words that it finds likeliest and their log-probabilities in two files: `mfd.TopK` with one class for all that is
not listed. Then the teacher is deleted. Students are trained on the words alone and on the files, over the same
batches.
"""

from __future__ import annotations

import argparse
import collections
import re
import statistics
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import mfd_fast as mfd

CONTEXT, WORDS = 8, 2000


class Model(nn.Module):
    """Embeddings of the last words, one hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.hidden = nn.Sequential(
            nn.Linear(CONTEXT * width, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * width), nn.GELU()
        )
        self.head = nn.Linear(2 * width, WORDS)

    def forward(self, context: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(context).flatten(1)))


def text() -> tuple[Tensor, Tensor]:
    """Contexts `[N, 8]` and next words `[N]`; word 0 stands for the rare ones."""
    words = re.findall(r"\w+|[^\w\s]", "\n".join(topics[name] for name in sorted(topics)).lower())
    known = {word: i for i, (word, _) in enumerate(collections.Counter(words).most_common(WORDS - 1), 1)}
    ids = torch.tensor([known.get(word, 0) for word in words])
    windows = ids.unfold(0, CONTEXT + 1, 1)
    return windows[:, :CONTEXT].contiguous(), windows[:, CONTEXT].contiguous()


class Store:
    """Two files of N rows: log-probabilities in float16, words in int16."""

    def __init__(self, folder: Path, rows: int, listed: int) -> None:
        shape = (rows, listed)
        self.values = np.lib.format.open_memmap(folder / "values.npy", "w+", np.float16, shape)
        self.indices = np.lib.format.open_memmap(folder / "indices.npy", "w+", np.int16, shape)

    def write(self, rows: slice, logits: Tensor) -> None:
        values, indices = torch.log_softmax(logits, -1).topk(self.values.shape[1])
        self.values[rows], self.indices[rows] = values.half().numpy(), indices.short().numpy()

    def read(self, rows: Tensor) -> mfd.TopK:
        values, indices = (torch.from_numpy(file[rows.numpy()]) for file in (self.values, self.indices))
        return mfd.TopK(values.float(), indices.long(), tail="bucket")

    @property
    def megabytes(self) -> float:
        return (self.values.nbytes + self.indices.nbytes) / 1e6


def fit(model: Model, loss_of, batches: list[Tensor], progress: Progress, task, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))
    for batch in batches:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.advance(task)


def main(seeds: int = 2, steps: int = 400, listed: int = 32, rows: int = 256) -> dict[str, list[float]]:
    """Cross-entropy on the last tenth of the text, in nats a word, by model and seed."""
    torch.set_num_threads(1)  # the tensors are too small for more
    context, target = text()
    cut = int(0.9 * len(target))
    found: dict[str, list[float]] = {"teacher": [], "student, words alone": [], "student, stored teacher": []}

    def test(name: str, model: Model) -> None:
        with torch.no_grad():
            logits = torch.cat([model(part) for part in context[cut:].split(1024)])
            found[name].append(nn.functional.cross_entropy(logits, target[cut:]).item())

    with Progress() as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("teacher", total=(1 + 2 * seeds) * steps)
        torch.manual_seed(0)
        teacher = Model(64)
        batches = [torch.randint(cut, (rows,)) for _ in range(steps)]

        def words_alone(i: Tensor, model: Model = teacher) -> Tensor:
            return nn.functional.cross_entropy(model(context[i]), target[i])

        fit(teacher, words_alone, batches, progress, task, 3e-3)
        test("teacher", teacher)
        store = Store(Path(folder), cut, listed)
        with torch.no_grad():
            for start in range(0, cut, 1024):
                part = slice(start, min(start + 1024, cut))
                store.write(part, teacher(context[part]))
        del teacher, words_alone
        progress.console.print(
            f"stored: {cut} places × {listed} words, {store.megabytes:.0f} MB; "
            f"all logits in float16: {cut * WORDS * 2 / 1e6:.0f} MB"
        )
        for seed in range(seeds):
            for name in ("student, words alone", "student, stored teacher"):
                torch.manual_seed(seed)
                student = Model(12)
                progress.update(task, description=name)
                batches = [torch.randint(cut, (rows,)) for _ in range(steps)]

                def loss_of(i: Tensor, name: str = name, student: Model = student) -> Tensor:
                    if name == "student, words alone":
                        return nn.functional.cross_entropy(student(context[i]), target[i])
                    return mfd.distill_loss(
                        student(context[i]), store.read(i), target[i], soft_weight=0.7, hard_weight=0.3
                    )

                fit(student, loss_of, batches, progress, task, 1e-2)
                test(name, student)
    return found


def show(found: dict[str, list[float]]) -> None:
    table = Table(title="cross-entropy on unseen text, nats a word (lower is better)")
    for name in ("model", "mean", "by seed"):
        table.add_column(name)
    for name, each in found.items():
        table.add_row(name, f"{statistics.mean(each):.3f}", "  ".join(f"{value:.3f}" for value in each))
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--listed", type=int, default=32, help="K: words stored a place")
    show(main(**vars(parser.parse_args())))
