"""Under torch.compile a small call of static shapes on a CPU is traced as the reference; every other stays opaque."""

import pytest
import torch

import mfd_fast as mfd
from mfd_fast.backends import choice


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calls(rows):
    x, y = torch.randn(rows, 8).requires_grad_(), torch.randn(rows, 8)
    labels = torch.arange(rows) % 8
    return {
        "distill_loss": (lambda **o: mfd.distill_loss(x, y, labels, hard_weight=0.5, **o), [x]),
        "modal_pool": (lambda **o: mfd.modal_pool([x, y], y[0], **o).pooled.square().mean(), [x]),
        "feature_loss": (lambda **o: mfd.feature_loss(x, y, **o), [x]),
        "mfd_loss": (lambda **o: mfd.mfd_loss([x, y], y[0], y[:4], None, y[:, :4], **o).loss, [x]),
    }


def opaque_ops(call, **how):
    """Value, gradient, and the ops of mfd_fast that a compiler sees."""
    seen = []

    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if "mfd_fast" in str(node.target))
        return graph

    function, (leaf,) = call
    loss = torch.compile(function, backend=look, fullgraph=True, **how)()
    return (loss.detach(), torch.autograd.grad(loss, leaf)[0]), seen


@pytest.mark.parametrize("op", choice.TRACED_ELEMENTS)
def test_small_calls_are_traced_and_equal(op):
    call = calls(16)[op]
    found, seen = opaque_ops(call, dynamic=False)
    assert seen == []
    loss = call[0]()
    for a, b in zip(found, (loss.detach(), torch.autograd.grad(loss, call[1])[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("op", choice.TRACED_ELEMENTS)
def test_large_dynamic_and_chosen_calls_stay_opaque(op, monkeypatch):
    call = calls(16)[op]
    named = call[0], call[1]
    assert opaque_ops((lambda: named[0](backend="cpu"), call[1]), dynamic=False)[1]
    torch._dynamo.reset()
    with mfd.use_backend("cpu"):
        assert opaque_ops(call, dynamic=False)[1]
    torch._dynamo.reset()
    assert opaque_ops(call, dynamic=True)[1]
    torch._dynamo.reset()
    monkeypatch.setitem(choice.TRACED_ELEMENTS, op, 1)
    assert opaque_ops(call, dynamic=False)[1]


def test_explain_says_so():
    small, large = torch.zeros(4, 5), torch.zeros(512, 1000)
    said = "inside torch.compile a call this small is traced as the reference"
    assert said in mfd.explain(mfd.distill_loss, small, small).reason
    for logits, options in ((large, {}), (small, {"divergence": "jsd"}), (small.bfloat16(), {})):
        assert said not in mfd.explain(mfd.distill_loss, logits, logits, **options).reason


@pytest.mark.parametrize("label", [-1, 8])
def test_a_label_out_of_range_is_nan_in_a_traced_call(label):
    """A graph does not stop for a check; eager raises."""
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    labels = torch.tensor([0, 1, label, -100])
    call = torch.compile(mfd.distill_loss, backend="eager", fullgraph=True, dynamic=False)
    found = call(x, y, labels, hard_weight=0.5, reduction="none")
    assert found.isnan().tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="label"):
        mfd.distill_loss(x, y, labels, hard_weight=0.5)
