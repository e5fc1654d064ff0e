"""The measured ops: inputs, the call into mfd_fast, the eager call, and the least work that physics allows.

``linear_distill`` is ``linear_distill_loss``, where rivals that start from hidden states compete; ``student_step`` is a
composition around public ops: one whole step of a small student without its optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mfd_fast as mfd
from mfd_fast.backends import protocol
from mfd_fast.testing import DISTANCES, distill_inputs

from . import eager
from .module_ops import MODULES
from .records import Arguments, BenchOp, Sizes, Work, generator, near, normal
from .workloads import Workload


def _public(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the public op takes them."""
    named = {"divergence": mfd.AlphaBeta(*eager.ALPHA_BETA)} if options.get("divergence") == "alpha_beta" else {}
    return {**options, **named}


def _explained(op: Callable[..., Any]) -> Callable[..., mfd.Choice]:
    return lambda arguments, options, backend: mfd.explain(op, **arguments, **_public(options), backend=backend)


# ------------------------------------------------------------------------------------------------ distill_loss


def _distill_inputs(sizes: Sizes, dtype: torch.dtype, distance: str, seed: int) -> Arguments:
    sample = distill_inputs((sizes["rows"], sizes["classes"]), distance=distance, dtype=dtype, seed=seed)
    return {"student": sample.student, "teacher": sample.teacher, "labels": sample.labels}


def _distill_call(options: Mapping[str, Any], backend: str | None) -> Callable[..., Tensor]:
    return lambda **arguments: mfd.distill_loss(**arguments, **_public(options), backend=backend)


def _distill_work(sizes: Sizes, item: int, training: bool) -> Work:
    return Work((3 if training else 2) * sizes["rows"] * sizes["classes"] * item)


# ----------------------------------------------------------------------------------------------- distill_terms


def _terms_call(options: Mapping[str, Any], backend: str | None) -> Callable[..., Tensor]:
    def call(**arguments: Any) -> Tensor:
        terms = mfd.distill_terms(**arguments, **options, backend=backend)
        return torch.stack([term for term in terms[:-1] if term is not None]).sum(0).mean()

    return call


def _terms_work(sizes: Sizes, item: int, training: bool) -> Work:
    """Logits in; in training once more, and the gradient out: it depends on a gradient per row and term."""
    return Work((5 if training else 2) * sizes["rows"] * sizes["classes"] * item)


# --------------------------------------------------------------------------------------------------- topk_loss


def _topk_inputs(sizes: Sizes, dtype: torch.dtype, distance: str, seed: int) -> Arguments:
    sample = distill_inputs((sizes["rows"], sizes["classes"]), distance=distance, dtype=dtype, seed=seed)
    values, indices = F.log_softmax(sample.teacher.float(), -1).topk(min(sizes["listed"], sizes["classes"]), -1)
    return {"student": sample.student, "values": values.to(dtype), "indices": indices}


def _topk_call(options: Mapping[str, Any], backend: str | None) -> Callable[..., Tensor]:
    return lambda student, values, indices: mfd.distill_loss(
        student, mfd.TopK(values, indices), **options, backend=backend
    )


def _topk_choice(arguments: Arguments, options: Mapping[str, Any], backend: str | None) -> mfd.Choice:
    teacher = mfd.TopK(arguments["values"], arguments["indices"])
    return mfd.explain(mfd.distill_loss, arguments["student"], teacher, **options, backend=backend)


def _topk_work(sizes: Sizes, item: int, training: bool) -> Work:
    """The student in (and its gradient out), the listed values and their int64 indices in."""
    passes = 2 if training else 1
    return Work(sizes["rows"] * (passes * sizes["classes"] * item + sizes["listed"] * (item + 8)))


# -------------------------------------------------------------------------------------------------- modal_pool


def _pool_inputs(sizes: Sizes, dtype: torch.dtype, distance: str, seed: int) -> Arguments:  # noqa: ARG001
    shape = (sizes["batch"], sizes["width"])
    features = [normal(shape, 7 * seed + m, dtype) for m in range(sizes["modalities"])]
    return {"features": features, "query": normal(shape[1:], 7 * seed + 99, dtype)}


def _pool_call(options: Mapping[str, Any], backend: str | None) -> Callable[..., Tensor]:
    return lambda **arguments: mfd.modal_pool(**arguments, **options, backend=backend).pooled


def _pool_work(sizes: Sizes, item: int, training: bool) -> Work:
    """Forward: read M, write 1. Backward: read M and d pooled, write M."""
    passes = sizes["modalities"] + 1 + (2 * sizes["modalities"] + 1 if training else 0)
    return Work(passes * sizes["batch"] * sizes["width"] * item)


# ------------------------------------------------------------------------------------------------ feature_loss


def _feature_inputs(sizes: Sizes, dtype: torch.dtype, distance: str, seed: int) -> Arguments:
    shape = (sizes["rows"], sizes["width"])
    student = [normal(shape, 7 * seed + tap, dtype) for tap in range(sizes["taps"])]
    teacher = [near(s, distance, 7 * seed + 50 + tap) for tap, s in enumerate(student)]
    return {"student": student, "teacher": teacher}


def _feature_call(options: Mapping[str, Any], backend: str | None) -> Callable[..., Tensor]:
    return lambda **arguments: mfd.feature_loss(**arguments, **options, backend=backend)


def _feature_work(sizes: Sizes, item: int, training: bool) -> Work:
    return Work((3 if training else 2) * sizes["taps"] * sizes["rows"] * sizes["width"] * item)


# ---------------------------------------------------------------------------------------------------- mfd_loss


def _mfd_inputs(sizes: Sizes, dtype: torch.dtype, distance: str, seed: int) -> Arguments:
    batch, width, classes = sizes["batch"], sizes["width"], sizes["classes"]
    pool = _pool_inputs(sizes, dtype, distance, seed)
    head = normal((classes, width), 7 * seed + 101, dtype, 3 * width**-0.5)
    student = F.linear(eager.modal_pool(pool["features"], pool["query"]).float(), head.float())
    return {
        **pool,
        "head_weight": head,
        "head_bias": normal((classes,), 7 * seed + 102, dtype, 0.1),
        "teacher_logits": near(student, distance, 7 * seed + 103).to(dtype),
        "labels": torch.randint(classes, (batch,), generator=generator(7 * seed + 104)),
        "teacher_features": normal((batch, width), 7 * seed + 105, dtype),
    }


def _mfd_call(options: Mapping[str, Any], backend: str | None) -> Callable[..., Tensor]:
    return lambda **arguments: mfd.mfd_loss(**arguments, **options, backend=backend).loss


def _mfd_work(sizes: Sizes, item: int, training: bool) -> Work:
    """Features in (and their gradients out), teacher features and logits; z = yWᵀ, dy = dz W, dW = dzᵀ y."""
    batch, modalities, width, classes = (sizes[key] for key in ("batch", "modalities", "width", "classes"))
    passes = (2 * modalities if training else modalities) + 1
    forward = ((batch, width, classes),)
    backward = ((batch, classes, width), (classes, batch, width)) if training else ()
    return Work((passes * batch * width + batch * classes) * item, forward + backward)


# ---------------------------------------------------------------------------------------------- linear_distill


def _linear_inputs(sizes: Sizes, dtype: torch.dtype, distance: str, seed: int) -> Arguments:
    """A near teacher has the student's head and hidden states, cut or filled up with zeros to its own width.

    A width of 0: no teacher, for the labels' term alone.
    """
    rows, hidden, wide, classes = sizes["rows"], sizes["hidden"], sizes["teacher"], sizes["classes"]
    student_hidden = normal((rows, hidden), 7 * seed, dtype)
    student_weight = normal((classes, hidden), 7 * seed + 1, dtype, 3 * hidden**-0.5)
    teacher_hidden = teacher_weight = None
    if wide and DISTANCES[distance] is None:
        teacher_hidden = normal((rows, wide), 7 * seed + 3, dtype)
        teacher_weight = normal((classes, wide), 7 * seed + 2, dtype, 3 * wide**-0.5)
    elif wide:
        teacher_hidden = near(F.pad(student_hidden, (0, wide - hidden)), distance, 7 * seed + 3)
        teacher_weight = F.pad(student_weight, (0, wide - hidden)).clone()
    return {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "labels": torch.randint(classes, (rows,), generator=generator(7 * seed + 4)),
    }


def _linear_call(options: Mapping[str, Any], backend: str | None) -> Callable[..., Tensor]:
    return lambda **arguments: mfd.linear_distill_loss(**arguments, **options, backend=backend).loss


def _linear_work(sizes: Sizes, item: int, training: bool) -> Work:
    """Both heads forward, d hidden and d weight backward; hidden states and weights in, their gradients out."""
    rows, hidden, wide, classes = sizes["rows"], sizes["hidden"], sizes["teacher"], sizes["classes"]
    products = [(rows, width, classes) for width in (hidden, wide) if width]
    if training:
        products += [(rows, classes, hidden), (classes, rows, hidden)]
    return Work((rows + classes) * ((2 if training else 1) * hidden + wide) * item, tuple(products), exact=True)


# ------------------------------------------------------------------------------------------------ student_step


def _step_inputs(sizes: Sizes, dtype: torch.dtype, distance: str, seed: int) -> Arguments:
    found = _mfd_inputs(sizes, dtype, distance, seed)
    shapes = (sizes["batch"], sizes["inputs"]), (sizes["width"], sizes["inputs"])
    scale = sizes["inputs"] ** -0.5
    modalities = range(sizes["modalities"])
    return {
        "inputs": [normal(shapes[0], 7 * seed + 200 + m, dtype) for m in modalities],
        "encoders": [normal(shapes[1], 7 * seed + 300 + m, dtype, scale) for m in modalities],
        **{key: value for key, value in found.items() if key != "features"},
    }


def _step_features(inputs: list[Tensor], encoders: list[Tensor]) -> list[Tensor]:
    return [F.relu(F.linear(x, w)) for x, w in zip(inputs, encoders, strict=True)]


def _step_call(options: Mapping[str, Any], backend: str | None) -> Callable[..., Tensor]:
    return lambda inputs, encoders, **rest: (
        mfd.mfd_loss(_step_features(inputs, encoders), **rest, **options, backend=backend).loss
    )


def _step_eager(inputs: list[Tensor], encoders: list[Tensor], **rest: Any) -> Tensor:
    return eager.mfd_loss(_step_features(inputs, encoders), **rest)


def _step_choice(arguments: Arguments, options: Mapping[str, Any], backend: str | None) -> mfd.Choice:
    rest = {key: value for key, value in arguments.items() if key not in ("inputs", "encoders")}
    shape = (arguments["inputs"][0].shape[0], arguments["encoders"][0].shape[0])
    features = [arguments["inputs"][0].new_zeros(()).expand(shape)] * len(arguments["inputs"])
    return mfd.explain(mfd.mfd_loss, features, **rest, **options, backend=backend)


def _step_work(sizes: Sizes, item: int, training: bool) -> Work:
    """The head's work with its features in cache, and one GEMM forward and one backward per encoder."""
    head = _mfd_work(sizes, item, training)
    batch, inputs, width, modalities = (sizes[key] for key in ("batch", "inputs", "width", "modalities"))
    encoders = [(batch, inputs, width)] * modalities + ([(width, batch, inputs)] * modalities if training else [])
    return Work(head.nbytes + modalities * batch * inputs * item, (*head.products, *encoders))


_MFD_SIZES = {"batch": 1024, "modalities": 3, "width": 768, "classes": 1000}
_MFD_OPTIONS = {"divergence": "forward_kl", "temperature": 2.0, "hard_weight": 0.5, "feature_weight": 0.5}
_MFD_ROWS = frozenset({"features", "teacher_logits", "labels", "teacher_features"})

#: How each public op is measured: alone, and in what is made of it.
_MEASURED: dict[str, tuple[BenchOp, ...]] = {
    "distill_loss": (
        BenchOp(
            "distill_loss",
            sizes={"rows": 4096, "classes": 1000},
            options={"divergence": "forward_kl", "temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.0},
            inputs=_distill_inputs,
            rows=frozenset({"student", "teacher", "labels"}),
            leaves=frozenset({"student"}),
            call=_distill_call,
            eager=eager.distill_loss,
            choice=_explained(mfd.distill_loss),
            work=_distill_work,
        ),
        BenchOp(
            "topk_loss",
            sizes={"rows": 4096, "classes": 1000, "listed": 64},
            options={"temperature": 2.0},
            inputs=_topk_inputs,
            rows=frozenset({"student", "values", "indices"}),
            leaves=frozenset({"student"}),
            call=_topk_call,
            eager=eager.topk_loss,
            choice=_topk_choice,
            work=_topk_work,
        ),
    ),
    "distill_terms": (
        BenchOp(
            "distill_terms",
            sizes={"rows": 4096, "classes": 1000},
            options={"temperature": 2.0},
            inputs=_distill_inputs,
            rows=frozenset({"student", "teacher", "labels"}),
            leaves=frozenset({"student"}),
            call=_terms_call,
            eager=eager.distill_terms,
            choice=_explained(mfd.distill_terms),
            work=_terms_work,
        ),
    ),
    "linear_distill_loss": (
        BenchOp(
            "linear_distill",
            sizes={"rows": 1024, "hidden": 512, "teacher": 512, "classes": 32000},
            options={"divergence": "forward_kl", "temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.0},
            inputs=_linear_inputs,
            rows=frozenset({"student_hidden", "teacher_hidden", "labels"}),
            leaves=frozenset({"student_hidden", "student_weight"}),
            call=_linear_call,
            eager=eager.linear_distill,
            choice=_explained(mfd.linear_distill_loss),
            work=_linear_work,
        ),
    ),
    "modal_pool": (
        BenchOp(
            "modal_pool",
            sizes={"batch": 1024, "modalities": 3, "width": 768},
            options={},
            inputs=_pool_inputs,
            rows=frozenset({"features"}),
            leaves=frozenset({"features", "query"}),
            call=_pool_call,
            eager=eager.modal_pool,
            choice=_explained(mfd.modal_pool),
            work=_pool_work,
            mean=False,
        ),
    ),
    "feature_loss": (
        BenchOp(
            "feature_loss",
            sizes={"rows": 2048, "taps": 12, "width": 768},
            options={"kind": "mse"},
            inputs=_feature_inputs,
            rows=frozenset({"student", "teacher"}),
            leaves=frozenset({"student"}),
            call=_feature_call,
            eager=eager.feature_loss,
            choice=_explained(mfd.feature_loss),
            work=_feature_work,
        ),
    ),
    "mfd_loss": (
        BenchOp(
            "mfd_loss",
            sizes=_MFD_SIZES,
            options=_MFD_OPTIONS,
            inputs=_mfd_inputs,
            rows=_MFD_ROWS,
            leaves=frozenset({"features", "query", "head_weight", "head_bias"}),
            call=_mfd_call,
            eager=eager.mfd_loss,
            choice=_explained(mfd.mfd_loss),
            work=_mfd_work,
        ),
        BenchOp(
            "student_step",
            sizes={"batch": 256, "modalities": 3, "width": 512, "classes": 100, "inputs": 1024},
            options=_MFD_OPTIONS,
            inputs=_step_inputs,
            rows=(_MFD_ROWS - {"features"}) | {"inputs"},
            leaves=frozenset({"encoders", "query", "head_weight", "head_bias"}),
            call=_step_call,
            eager=_step_eager,
            choice=_step_choice,
            work=_step_work,
        ),
    ),
}
#: Follows from the record of the public ops: one that is not measured has no entry above, and no benchmark runs.
OPS: dict[str, BenchOp] = {
    record.name: record
    for record in (
        *(replace(record, public=op) for op in protocol.OPS for record in _MEASURED[op]),
        *MODULES,
    )
}


def of(workload: Workload) -> BenchOp:
    return OPS[workload.op]


def options_of(workload: Workload) -> dict[str, Any]:
    """The op's defaults with the workload's own options over them."""
    return {**of(workload).options, **workload.options}
