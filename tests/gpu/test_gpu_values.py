"""What differs on a GPU: real row lengths on every rung, labels that are not read back, torch.compile, launches."""

import pytest
import torch
from draws import assert_draws_obey_rule
from harness import requiring_grad
from on_device import DEVICE, ON_GPU, here
from op_db import RECORDS, samples_on
from steps import OP_IDS, OPS, placed, step_of

import mfd_fast as mfd
from mfd_fast.backends.cuda import distill_loss as cuda_rows
from mfd_fast.bench import memory
from mfd_fast.problems.rows import check_rows

LOSS = RECORDS["distill_loss"]
CLASSES = [130, 1100, 8191, 32000, 50257, 128256, 202048, 10**6 + 3] if ON_GPU else [130, 1100]
SAMPLES = ["plain", "labels", "transforms", "jsd", "alpha_beta", "dkd", "nkd", "standardize"]
#: Every row length with one sample, and every other sample with one row length.
LENGTHS = [("plain", classes) for classes in CLASSES]
LENGTHS += [
    (name, CLASSES[1 + i % 4] if ON_GPU else CLASSES[0]) for i, name in enumerate(SAMPLES[1:] if ON_GPU else ["labels"])
]
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "classes"), LENGTHS)
@pytest.mark.parametrize("backend", ["cuda", "triton"] if ON_GPU else ["cuda"])
def test_row_lengths(backend, name, classes, dtype):
    def arguments_of(seed):
        return LOSS.samples(dtype=dtype, rows=5, classes=classes, seed=seed)[name]

    for names in (("student",), ("student", "teacher")):
        assert_draws_obey_rule(LOSS, backend, arguments_of, 3, f"{backend} {classes} {name}", names=names)


def test_these_row_lengths_reach_every_rung():
    seen = set()
    for classes in CLASSES:
        logits = torch.zeros((1, classes), dtype=torch.bfloat16, device=DEVICE).expand(2, classes)
        seen.add(cuda_rows.plan(check_rows("distill_loss", logits, logits, None))[0])
    has_clusters = ON_GPU and 9 <= torch.cuda.get_device_capability()[0] < 12
    wanted = {"warp", "block", "stream", *(["cluster"] if has_clusters else [])} if ON_GPU else {"warp", "block"}
    assert seen == wanted


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("label", [99, -1, 2**40])
def test_a_bad_label_gives_nan_for_its_row_and_is_never_read(backend, label):
    arguments = placed({**LOSS.samples()["plain"], "labels": torch.tensor([0, 1, label, 2, 3, 4])})
    call = {**arguments, "hard_weight": 0.5, "reduction": "none", "backend": backend}
    if not ON_GPU:
        with pytest.raises(ValueError, match="labels must be in"):
            here(LOSS.op)(**call)
        return
    leaf = call["student"].requires_grad_()
    loss = here(LOSS.op)(**call)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    assert bool(grad[[0, 1, 3, 4, 5]].isfinite().all())


@pytest.mark.parametrize(("record", "backend"), OPS, ids=OP_IDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_as_one_graph(record, backend):
    """torch.compile(fullgraph=True, dynamic=True), forward and backward, with two sizes.

    In float32: a compiled mfd_loss is a chain of ops, whose intermediate results bfloat16 would round.
    """
    torch._dynamo.reset()
    name = samples_on(record, backend)[:2][-1]
    plain = getattr(record.op, "unmoved", record.op)
    engine = "inductor" if ON_GPU else "aot_eager"
    call = here(torch.compile(plain, fullgraph=True, dynamic=True, backend=engine))
    for rows in (6, 8):
        arguments = placed(record.samples(rows=rows)[name])
        found, expected = (step_of(record, backend, arguments, call=c)() for c in (call, None))
        for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
            torch.testing.assert_close(a, b, **CLOSE, msg=key)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("classes", [10, 1000])
def test_one_launch_forward_and_at_most_one_backward(backend, classes):
    arguments = placed(LOSS.samples(dtype=torch.bfloat16, rows=256 if ON_GPU else 4, classes=classes)["plain"])
    arguments = requiring_grad(arguments, ("student",))
    forward = lambda: here(LOSS.op)(**arguments, backend=backend)  # noqa: E731
    up = torch.ones_like(forward())
    losses = [forward() for _ in range(2)]  # a second backward of one loss computes the pass anew
    backward = lambda: torch.autograd.grad(losses.pop(), arguments["student"], up)  # noqa: E731
    backward()
    for step, most in ((forward, 1), (backward, 1)):
        count = memory.launches(step, DEVICE)
        assert count is None or count <= most


@pytest.mark.parametrize(("record", "backend"), OPS, ids=OP_IDS)
def test_a_gpu_takes_the_first_backend_of_the_table(record, backend):
    arguments = placed(next(iter(record.samples().values())))
    choice = mfd.explain(record.op, **arguments)
    assert choice.backend in (("cuda", "triton") if ON_GPU else ("cpu", "reference"))
