"""torch.compile(fullgraph=True, dynamic=True), forward and backward, with no recompilation."""

import op_db_divergences
import pytest
import torch
from harness import evaluate, map_tensors, on
from op_db import RECORDS, SAMPLE_CASES, SAMPLE_IDS
from torch._dynamo.testing import CompileCounterWithBackend

# Triton interpreted is not for tracing; Inductor meets the opaque op of the others. To trace plain PyTorch takes many
# times as long: the quick tier does it in test_traced_reference and, here, where every sample does.
REFERENCE = pytest.param("reference", marks=pytest.mark.rest)
# An opaque op is quick to trace, so the row losses show every sample; plain PyTorch shows its richest one.
RICHEST = {"distill_loss": "labels", "distill_terms": "per_row", "feature_loss": "taps"}
COMPILED = [
    (case, i)
    for case, i in zip(SAMPLE_CASES, SAMPLE_IDS, strict=True)
    if case[1] == "cpu" or (case[1] == "reference" and case[2] == RICHEST.get(case[0].name, "everything"))
]
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(record, backend, engine):
    return torch.compile(on(record, backend), fullgraph=True, dynamic=True, backend=engine)


def assert_agrees(record, backend, call, arguments, names=None):
    found = evaluate(record, lambda **a: record.outputs(call(**a)), arguments, names=names, poisoned=False)
    expected = evaluate(record, on(record, backend), arguments, names=names)
    assert found.outputs.keys() == expected.outputs.keys()
    for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=key)


@pytest.mark.quick("record")
@pytest.mark.parametrize(("record", "backend", "name"), [c for c, _ in COMPILED], ids=[i for _, i in COMPILED])
def test_whole_graph_forward_and_backward(record, backend, name):
    call = compiled(record, backend, "aot_eager")
    assert_agrees(record, backend, call, record.samples()[name], record.differentiable)


@pytest.mark.parametrize("backend", ["cpu", REFERENCE])
@pytest.mark.parametrize("op", ["distill_loss", pytest.param("mfd_loss", marks=pytest.mark.rest)])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor(op, backend):
    record = RECORDS[op]
    name = RICHEST.get(op, "everything")
    call = compiled(record, backend, "inductor")
    assert_agrees(record, backend, call, record.samples()[name], record.differentiable[:1])


def test_choice_of_backend_is_made_when_the_graph_runs():
    record = RECORDS["distill_loss"]
    call = torch.compile(record.op, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_agrees(record, "cpu", call, record.samples()["labels"], ("student",))


@pytest.mark.quick("wrt")
@pytest.mark.parametrize("wrt", ["one", "all"])
@pytest.mark.parametrize("name", op_db_divergences.samples(torch.float32, "far", 0, 6, 11))
def test_every_divergence_and_teacher_without_a_backend_named(name, wrt):
    """The op chooses when it runs: the kernels that have the sample, else the reference."""
    record = RECORDS["distill_loss"]
    call = torch.compile(record.op, fullgraph=True, dynamic=True, backend="aot_eager")
    names = ("student",) if wrt == "one" else record.differentiable
    assert_agrees(record, "reference", call, record.samples()[name], names)


def changed(arguments, factor):
    """Other temperatures and weights; everything else as it was."""
    tuned = ("temperature", "teacher_temperature", "soft_weight", "hard_weight", "weight", "normalizer")
    return {k: map_tensors(v, lambda t: t * factor) if k in tuned else v for k, v in arguments.items()}


@pytest.mark.parametrize(
    ("backend", "name", "wrt"),
    [
        *(("cpu", n, w) for n in ("per_row", "shared_temperature", "transforms", "labels") for w in ("one", "all")),
        pytest.param("reference", "per_row", "all", marks=pytest.mark.rest),
        pytest.param("reference", "shared_temperature", "one", marks=pytest.mark.rest),
    ],
)
def test_tensor_temperatures_and_weights_never_recompile(backend, name, wrt):
    record = RECORDS["distill_loss"]
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(record, backend, counter)
    names = ("student",) if wrt == "one" else record.differentiable
    arguments = record.samples()[name]
    assert_agrees(record, backend, call, arguments, names)
    compiled_once = counter.frame_count
    for factor in (1.5, 0.3):
        assert_agrees(record, backend, call, changed(arguments, factor), names)
    assert counter.frame_count == compiled_once > 0


@pytest.mark.parametrize("backend", ["cpu", REFERENCE])
def test_number_of_rows_and_classes_never_recompiles(backend):
    record = RECORDS["distill_loss"]
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(record, backend, counter)
    counts = []
    for rows, classes in ((6, 11), (8, 5), (4, 70)):
        sample = record.samples(rows=rows, classes=classes)["labels"]
        assert_agrees(record, backend, call, sample, ("student",))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("backend", ["cpu", REFERENCE])
def test_schedule_in_python_numbers_never_recompiles(backend):
    record = RECORDS["distill_loss"]
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(record, backend, counter)
    sample = record.samples()["plain"]
    counts = []
    for step in range(6):
        temperature, soft_weight = 4.0 - 0.5 * step, 0.3 + 0.1 * step
        arguments = {**sample, "temperature": temperature, "soft_weight": soft_weight}
        assert_agrees(record, backend, call, arguments, ("student",))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("backend", ["cpu", REFERENCE])
def test_inside_a_model(backend):
    """A training step compiled as a whole, twice, learns as the eager one does."""
    record = RECORDS["distill_loss"]
    sample = record.samples(rows=8, classes=6)["plain"]

    def trained(wrap):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 6)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x, teacher):
            return record.op(model(x), teacher, temperature=2.0, backend=backend)

        step = wrap(step)
        for _ in range(3):
            optimizer.zero_grad()
            step(sample["student"], sample["teacher"]).backward()
            optimizer.step()
        return model.weight.detach()

    whole = trained(lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(whole, trained(lambda f: f), **CLOSE)
