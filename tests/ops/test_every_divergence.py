"""Every divergence in the ops whose samples do not have it: distill_loss has samples of its own for each."""

import itertools

import pytest
import torch
from draws import assert_draws_obey_rule
from op_db import RECORDS
from op_db_divergences import DIVERGENCES

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OPS = {
    "distill_terms": ("student", "teacher"),
    "linear_distill_loss": ("student_hidden", "student_weight", "teacher_hidden"),
    "mfd_loss": ("features", "query", "head_weight"),
}
CASES = [
    pytest.param(RECORDS[op], *values, id="-".join((op, *values)))
    for op in OPS
    for values in itertools.product(RECORDS[op].backends, DIVERGENCES, DTYPES)
]


@pytest.mark.quick
@pytest.mark.parametrize(("record", "backend", "divergence", "dtype"), CASES)
def test_values_and_gradients_of_every_divergence(record, backend, divergence, dtype):
    def arguments_of(seed):
        arguments = record.samples(dtype=DTYPES[dtype], distance="near", seed=seed, rows=16, classes=7)["plain"]
        labels = torch.arange(16) % 7 if DIVERGENCES[divergence].needs_labels else None
        return {**arguments, "divergence": DIVERGENCES[divergence], "labels": labels}

    context = f"{record.name} {backend} {divergence}"
    without = ("predictions",) if record.name == "mfd_loss" else ()  # the argmax of rounded logits
    few = 2 if backend == "triton" else 8
    assert_draws_obey_rule(record, backend, arguments_of, few, context, without=without, names=OPS[record.name])
