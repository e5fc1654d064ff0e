"""Values and gradients obey the tolerance rule of mfd_fast.testing at every distance, dtype and size."""

import pytest
import torch
from draws import assert_draws_obey_rule
from harness import Result, assert_same, evaluate, on, reference64
from op_db import KERNEL_CASES, RECORDS, SAMPLE_CASES, crossed

from mfd_fast.testing import DISTANCES

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Samples whose gradient never comes from the forward pass.
ROW_OUTPUT = [n for n, s in RECORDS["distill_loss"].samples().items() if s.get("reduction") == "none"]
# Interpreted kernels are slow; the bound on one scalar is luck, so the others pool the errors of many draws.
DRAWS = {"reference": 8, "cpu": 8, "triton": 2, "cuda": 8}
#: Rows of the logits, likewise.
ROWS = {"reference": 24, "cpu": 24, "triton": 6, "cuda": 6}


@pytest.mark.quick("record", "backend", "name", "dtype")
@pytest.mark.parametrize(("record", "backend", "name", "distance", "dtype"), crossed(SAMPLE_CASES, DISTANCES, DTYPES))
def test_values_and_all_gradients(record, backend, name, distance, dtype):
    size = {"rows": ROWS[backend]} if record.name.startswith("distill") else {}

    def arguments_of(seed):
        return record.samples(dtype=DTYPES[dtype], distance=distance, seed=seed, **size)[name]

    assert_draws_obey_rule(record, backend, arguments_of, DRAWS[backend], f"{record.name} {backend} {name}")


@pytest.mark.parametrize(
    ("backend", "name", "distance", "dtype"),
    crossed([case for case in KERNEL_CASES if case[1] not in ROW_OUTPUT], DISTANCES, DTYPES),
)
def test_gradient_of_the_student_alone(backend, name, distance, dtype):
    """The scalar loss whose gradient is computed in the forward pass."""
    record = RECORDS["distill_loss"]

    def arguments_of(seed):
        return record.samples(dtype=DTYPES[dtype], distance=distance, seed=seed, rows=ROWS[backend])[name]

    assert_draws_obey_rule(record, backend, arguments_of, DRAWS[backend], f"{backend} {name}", names=("student",))


SIZES = [1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 61, 63, 64, 65, 127, 128, 129, 255, 256, 257]
SHAPES = [(n, 5) for n in (0, 1, 3, 7, 16, 17)] + [(2, c) for c in SIZES]
LONG = [(3, c) for c in (1000, 1021, 4095, 4097, 32000, 65537)] + [(1031, 3), (4099, 10)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("backend", "shape"),
    [(b, s) for b in ("cpu", "triton", "cuda") for s in SHAPES]
    + [("cpu", s) for s in LONG]
    + [(b, (2, 4097)) for b in ("triton", "cuda")],
    ids=str,
)
def test_row_sizes(backend, shape, dtype):
    """Zero, one, primes, powers of two and their neighbours, in rows and in classes."""
    record = RECORDS["distill_loss"]
    roads = (("none", ("student", "teacher")), ("mean", ("student",)))
    for reduction, names in roads if dtype != torch.bfloat16 else roads[:1]:

        def arguments_of(seed, reduction=reduction):
            arguments = record.samples(dtype=dtype, rows=shape[0], classes=shape[1], seed=seed)["labels"]
            return {**arguments, "reduction": reduction}

        context = f"{backend} {shape} {reduction}"
        if dtype == torch.bfloat16 or (dtype == torch.float32 and backend == "cpu"):
            few = 1 if dtype == torch.bfloat16 else 8 if shape in LONG else 32
            assert_draws_obey_rule(record, backend, arguments_of, few, context, names=names)
            continue
        found = evaluate(record, on(record, backend), arguments_of(0), names=names)
        exact = reference64(record, arguments_of(0), names=names)
        if dtype == torch.float64:
            assert_same(found, exact, context, rtol=1e-11, atol=1e-12)
        else:
            assert_same(found, narrowed(exact), context, rtol=2e-6, atol=2e-6)


def narrowed(result):
    """float64 results rounded to float32."""
    return Result(*({k: v.float() for k, v in part.items()} for part in (result.outputs, result.grads)))


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (0, 1), (3, 1)])
def test_degenerate_sizes_are_exact(backend, shape):
    record = RECORDS["distill_loss"]
    for reduction in ("mean", "sum", "none"):
        arguments = record.samples(rows=shape[0], classes=shape[1])["plain"]
        found = evaluate(record, on(record, backend), {**arguments, "reduction": reduction})
        assert found.outputs["loss"].shape == (shape[:1] if reduction == "none" else ())
        assert all(not bool(value.any()) for _, value in found.items())


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
def test_large_temperature_limit(backend):
    """T^2 KL -> |z_c - t_c|^2 / (2 C) with centred logits, as T -> infinity."""
    record = RECORDS["distill_loss"]
    arguments = record.samples(dtype=torch.float64, rows=4, classes=9)["plain"]
    student, teacher = (arguments[k] - arguments[k].mean(-1, keepdim=True) for k in ("student", "teacher"))
    limit = (student - teacher).square().sum(-1) / (2 * 9)
    previous = torch.inf
    for temperature in (1e2, 1e3, 1e4):
        loss = record.op(student, teacher, temperature=temperature, reduction="none", backend=backend)
        error = float((loss - limit).abs().max())
        assert error < 0.2 * previous  # the error falls as 1/T
        previous = error
    assert previous < 2e-3 * float(limit.max())


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_is_never_negative(backend, dtype):
    """Nearly equal distributions, where rivals in bfloat16 return -0.007."""
    record = RECORDS["distill_loss"]
    for seed in range(DRAWS[backend]):
        sample = record.samples(dtype=DTYPES[dtype], distance="almost", seed=seed)["plain"]
        loss = record.op(**{**sample, "reduction": "none"}, backend=backend)
        assert bool((loss >= 0).all())
        same = record.op(**{**sample, "teacher": sample["student"], "reduction": "none"}, backend=backend)
        assert bool((same >= 0).all())
        assert bool((same <= 4e-6).all())
