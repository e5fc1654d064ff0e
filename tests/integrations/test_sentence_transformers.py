"""Sentence Transformers' losses against ours: three steps of a tiny model from its configuration."""

import pytest
import torch
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as theirs
from torch import nn
from trainer_steps import agree, steps

from mfd_fast.integrations import sentence_transformers as ours


class Embedder(nn.Module):
    """What the losses ask of a SentenceTransformer: features to ``sentence_embedding``."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.EmbeddingBag(50, 8).double()

    def get_embedding_dimension(self):
        return 8

    def forward(self, features):
        return features | {"sentence_embedding": self.embed(features["input_ids"])}


def columns(n, step, rows=6):
    generator = torch.Generator().manual_seed(step)
    made = [torch.randint(0, 50, (rows, 5), generator=generator) for _ in range(n)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in made], generator


def compared(make, n, labels):
    model = Embedder()
    torch.manual_seed(1)
    loss = make(model).double()
    values = []

    def step(i):
        features, generator = columns(n, i)
        values.append(loss(features, labels(generator)))
        return values[-1]

    return steps(loss, step), [value.item() for value in values]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"student_temperature": 0.5, "teacher_temperature": 3.0},
        {"similarity_fct": util.pairwise_cos_sim},
    ],
    ids=["plain", "temperature", "two", "cosine"],
)
def test_sentence_transformers_scores(options):
    (found, values), (expected, their_values) = (
        compared(lambda model, kind=kind: kind(model, **options), 4, lambda g: torch.randn(6, 3, generator=g).double())
        for kind in (ours.DistillKLDivLoss, theirs.DistillKLDivLoss)
    )
    agree(found, expected)
    assert values == pytest.approx(their_values, rel=1e-9)


@pytest.mark.parametrize("metric", ["mse", "cosine", "l2"])
@pytest.mark.parametrize("projection", [None, 12])
@pytest.mark.parametrize("shared", [True, False])
def test_sentence_transformers_embeddings(metric, projection, shared):
    width = projection or 8
    shape = (6, width) if shared else (6, 2, width)
    (found, values), (expected, their_values) = (
        compared(
            lambda model, kind=kind: kind(model, metric, projection),
            2,
            lambda g: torch.randn(shape, generator=g).double(),
        )
        for kind in (ours.EmbedDistillLoss, theirs.EmbedDistillLoss)
    )
    agree(found, expected)
    assert values == pytest.approx(their_values, rel=1e-9)


def test_sentence_transformers_checks():
    loss = ours.DistillKLDivLoss(Embedder())
    with pytest.raises(ValueError, match="a query and at least two candidates, got 2"):
        loss(columns(2, 0)[0], torch.randn(6, 1))
    with pytest.raises(ValueError, match=r"the teacher's scores must be \[6, 2\], got \[6, 3\]"):
        loss(columns(3, 0)[0], torch.randn(6, 3))
    assert loss.get_config_dict()["temperature"] == 1.0
