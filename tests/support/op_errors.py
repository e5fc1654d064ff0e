"""Calls that break the contract, per op: what is changed in a valid call, the exception, and its message."""

from __future__ import annotations

import math
import warnings

import torch
from harness import Arguments, ErrorInput

import mfd_fast as mfd

META = torch.device("meta")


def sparse(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).to_sparse()


with warnings.catch_warnings():  # PyTorch's own about prototypes and what it will drop
    warnings.simplefilter("ignore")
    QUANTISED = torch.quantize_per_tensor(torch.zeros(6, 11), 0.1, 0, torch.quint8)
    CSR = torch.zeros(6, 11).to_sparse_csr()
    NESTED = torch.nested.nested_tensor([torch.zeros(3, 11), torch.zeros(2, 11)])


def _matches(op: str, cases: list[tuple[Arguments, type[Exception], str]]) -> list[ErrorInput]:
    """``match`` follows "op: "; the id is the changed argument and its number."""
    return [
        ErrorInput(changes, error, rf"{op}: {match}", f"{'+'.join(changes)}-{k}")
        for k, (changes, error, match) in enumerate(cases)
    ]


def _rows(op: str) -> list[tuple[Arguments, type[Exception], str]]:
    """What distill_loss and distill_terms share; the valid call has 6 rows of 11 classes."""
    six = torch.zeros(6, dtype=torch.int64)
    transform = mfd.LogitTransform
    return [
        ({"student": [1.0]}, TypeError, "student must be a tensor, got list"),
        ({"student": torch.zeros(6, 11, dtype=torch.int64)}, TypeError, "student must be .*float32.*got a int64"),
        ({"student": sparse(6, 11)}, TypeError, "student must be a dense tensor, got a sparse_coo float32 tensor"),
        ({"student": CSR}, TypeError, "student must be a dense tensor, got a sparse_csr"),
        ({"student": QUANTISED}, TypeError, "student must be a float16.*got a quint8 tensor"),
        ({"student": NESTED}, TypeError, "student must be a dense tensor, got a nested float32 tensor"),
        ({"teacher": sparse(6, 11)}, TypeError, "teacher must be a dense tensor, got a sparse_coo"),
        ({"labels": sparse(6, dtype=torch.int64)}, TypeError, "labels must be a dense tensor, got a sparse_coo int64"),
        ({"mask": sparse(6, dtype=torch.bool)}, TypeError, "mask must be a dense tensor, got a sparse_coo bool"),
        ({"temperature": sparse(6)}, TypeError, "temperature must be a dense tensor, got a sparse_coo"),
        ({"student": torch.tensor(1.0)}, ValueError, r"student must be of shape \[\.\.\., C\]"),
        ({"student": torch.zeros(6, 0), "teacher": torch.zeros(6, 0)}, ValueError, "student must be .* C >= 1"),
        ({"teacher": torch.zeros(6, 11, dtype=torch.bool)}, TypeError, "teacher must be .*float32.*got a bool"),
        ({"teacher": torch.zeros(5, 11)}, ValueError, r"teacher must be of shape \[6, 'C'\].*got .*\[5, 11\]"),
        ({"teacher": torch.zeros(6, 12)}, ValueError, "teacher must have as many classes as student, got 12 and 11"),
        ({"teacher": torch.zeros(6, 11, device=META)}, ValueError, "teacher must be on cpu, got .*meta"),
        ({"labels": six.int()}, TypeError, "labels must be a int64 tensor, got a int32"),
        ({"labels": [0] * 6}, TypeError, "labels must be a tensor, got list"),
        ({"labels": six[:5]}, ValueError, r"labels must be of shape \[6\] \(one value per row\), got .*\[5\]"),
        ({"labels": six.to(META)}, ValueError, "labels must be on cpu"),
        ({"labels": six + 11}, ValueError, r"labels must be in \[0, 11\) or ignore_index, got 11 in row 0"),
        ({"labels": six - 1}, ValueError, r"labels must be in \[0, 11\) or ignore_index, got -1 in row 0"),
        ({"mask": torch.ones(6)}, TypeError, "mask must be a bool tensor, got a float32"),
        ({"mask": torch.ones(6, 1, dtype=torch.bool)}, ValueError, r"mask must be of shape \[6\]"),
        ({"mask": True}, TypeError, "mask must be a tensor, got bool"),
        ({"temperature": 0}, ValueError, "temperature must be a finite number > 0, got int 0"),
        ({"temperature": -2.0}, ValueError, "temperature must be a finite number > 0, got float -2.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite number > 0, got float nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be a finite number > 0, got float inf"),
        ({"temperature": "2"}, TypeError, "temperature must be a number or a 0-d tensor, got str"),
        ({"temperature": True}, TypeError, "temperature must be a number or a 0-d tensor, got bool"),
        ({"temperature": torch.ones(5)}, ValueError, r"temperature must be of shape \[6\]"),
        ({"temperature": torch.tensor(True)}, TypeError, "temperature must be .*float.*tensor, got a bool"),
        ({"temperature": torch.tensor(0.0)}, ValueError, "temperature must be finite and > 0, got .* 0.0"),
        ({"temperature": torch.linspace(-1, 1, 6)}, ValueError, "temperature must be finite and > 0, got .* -1.0"),
        ({"temperature": torch.tensor(math.nan)}, ValueError, "temperature must be finite and > 0, got .* nan"),
        ({"temperature": torch.tensor(math.inf)}, ValueError, "temperature must be finite and > 0, got .* inf to inf"),
        ({"temperature": torch.tensor([1.0, math.inf] * 3)}, ValueError, "temperature must be finite .* 1.0 to inf"),
        ({"temperature": torch.tensor([1.0, math.nan] * 3)}, ValueError, "temperature must be finite .* got .* nan"),
        (
            {"teacher_temperature": torch.full((6,), math.nan)},
            ValueError,
            "teacher_temperature must be finite and > 0, got .* nan",
        ),
        ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be a finite number > 0"),
        ({"teacher_temperature": torch.ones(2)}, ValueError, r"teacher_temperature must be of shape \[6\]"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\], got float -0.1"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got float 1.5"),
        ({"label_smoothing": math.nan}, ValueError, r"label_smoothing must be in \[0, 1\], got float nan"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number, got str"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got float"),
        ({"student_transform": 2.0}, TypeError, "student_transform must be a LogitTransform or None, got float"),
        ({"teacher_transform": "x"}, TypeError, "teacher_transform must be a LogitTransform or None, got str"),
        ({"student_transform": transform(classes=12)}, ValueError, "student_transform.classes must be at most 11"),
        ({"teacher_transform": transform(classes=10)}, ValueError, "teacher must have as many classes .* 10 and 11"),
        ({"scale_by_temperature": 1}, TypeError, "scale_by_temperature must be a bool, got int"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of .*'forward_kl'.*got str 'kl'"),
        ({"divergence": 3}, TypeError, "divergence must be a name or a Divergence, got int"),
        ({"backend": "gpu"}, ValueError, "backend must be one of 'cuda', 'triton', 'cpu', 'reference', got str 'gpu'"),
    ]


def distill_terms() -> list[ErrorInput]:
    cases = [*_rows("distill_terms"), ({"teacher": None}, TypeError, "teacher must be a tensor, got NoneType")]
    return _matches("distill_terms", cases)


def distill_loss() -> list[ErrorInput]:
    six = torch.zeros(6, dtype=torch.int64)
    cases = [
        *_rows("distill_loss"),
        ({"teacher": None}, TypeError, "teacher must be a tensor where soft_weight is not the number 0, got NoneType"),
        ({"hard_weight": 0.5}, ValueError, "labels must be given when hard_weight is not 0"),
        ({"soft_weight": "1"}, TypeError, "soft_weight must be a number or a 0-d tensor, got str"),
        ({"soft_weight": math.inf}, ValueError, "soft_weight must be a finite number"),
        ({"soft_weight": torch.ones(6)}, ValueError, "soft_weight must be a number or a 0-d tensor"),
        ({"hard_weight": torch.ones(1), "labels": six}, ValueError, "hard_weight must be a number or a 0-d tensor"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must be of shape \[6\]"),
        ({"weight": torch.ones(6).long()}, TypeError, "weight must be .*float.*got a int64"),
        ({"weight": 1.0}, TypeError, "weight must be a tensor, got float"),
        ({"weight": sparse(6)}, TypeError, "weight must be a dense tensor, got a sparse_coo"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got str 'avg'"),
        ({"reduction": "sum", "normalizer": 2.0}, ValueError, "normalizer replaces the row count .* got 'sum'"),
        ({"normalizer": 0.0}, ValueError, "normalizer must be a finite number > 0"),
        ({"normalizer": torch.ones(6)}, ValueError, "normalizer must be a number or a 0-d tensor"),
    ]
    return _matches("distill_loss", cases)


def modal_pool() -> list[ErrorInput]:
    """The valid call has features 3 x [6, 11] and a query [11]."""
    present = torch.ones(6, 3, dtype=torch.bool)
    short = [torch.zeros(6, 11), torch.zeros(5, 11)]
    cases: list[tuple[Arguments, type[Exception], str]] = [
        ({"features": 1.0}, TypeError, "features must be a tensor or a sequence of tensors, got float"),
        ({"features": []}, ValueError, "features must be at least one modality"),
        ({"features": torch.zeros(11)}, ValueError, r"features must be of shape \[\.\.\., M, D\]"),
        ({"features": [torch.zeros(6, 11), 1]}, TypeError, r"features\[1\] must be a tensor, got int"),
        (
            {"features": short},
            ValueError,
            r"features\[1\] must be of shape \[6, 11\], as features\[0\], got .*\[5, 11\]",
        ),
        ({"features": [torch.zeros(6, 11).long()]}, TypeError, r"features\[0\] must be .*got a int64"),
        ({"features": [torch.zeros(6, 0)]}, ValueError, r"features\[0\] must be of shape .* D >= 1"),
        ({"features": [sparse(6, 11)]}, TypeError, r"features\[0\] must be a dense tensor, got a sparse_coo"),
        ({"features": sparse(6, 3, 11)}, TypeError, "features must be a dense tensor, got a sparse_coo"),
        ({"features": [QUANTISED]}, TypeError, r"features\[0\] must be a float16.*got a quint8"),
        ({"query": sparse(11)}, TypeError, "query must be a dense tensor, got a sparse_coo"),
        ({"present": sparse(6, 3, dtype=torch.bool)}, TypeError, "present must be a dense tensor"),
        ({"temperature": torch.tensor(math.nan)}, ValueError, "temperature must be finite and > 0, got .* nan"),
        ({"query": torch.zeros(10)}, ValueError, r"query must be of shape \[11\], got .*\[10\]"),
        ({"query": torch.zeros(11, device=META)}, ValueError, "query must be on cpu"),
        ({"scores": torch.zeros(6, 3)}, ValueError, "query and scores exclude each other"),
        ({"query": None, "scores": torch.zeros(6, 2)}, ValueError, r"scores must be of shape \[6, 3\]"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must be of shape \[3\], got .*\[2\]"),
        ({"bias": [0.0] * 3}, TypeError, "bias must be a tensor, got list"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be of shape \[6\]"),
        ({"present": present.float()}, TypeError, "present must be a bool tensor, got a float32"),
        ({"present": present[:, :2]}, ValueError, r"present must be of shape \[6, 3\]"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number"),
        ({"scale": "x"}, TypeError, "scale must be a number or None, got str"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ]
    return _matches("modal_pool", cases)


def feature_loss() -> list[ErrorInput]:
    """The valid call has student and teacher [6, 11]."""
    x = torch.zeros(6, 11)
    cases: list[tuple[Arguments, type[Exception], str]] = [
        ({"kind": "l2"}, ValueError, "kind must be one of 'mse', 'smooth_l1', 'cosine', got str 'l2'"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"student": None}, TypeError, r"student\[0\] must be a tensor, got NoneType"),
        ({"student": x.long()}, TypeError, r"student\[0\] must be .*got a int64"),
        ({"student": x.to_sparse()}, TypeError, r"student\[0\] must be a dense tensor, got a sparse_coo"),
        ({"teacher": QUANTISED}, TypeError, r"teacher\[0\] must be a float16.*got a quint8"),
        ({"projector": sparse(4, 11)}, TypeError, r"projector\[0\] must be a dense tensor"),
        ({"weight": sparse(1)}, TypeError, "weight must be a dense tensor"),
        ({"student": torch.tensor(1.0)}, ValueError, r"student\[0\] must be of shape .* D >= 1"),
        ({"teacher": torch.zeros(6, 10)}, ValueError, r"teacher\[0\] must be of shape \[6, 11\], got .*\[6, 10\]"),
        ({"teacher": [x]}, ValueError, "teacher must be like student: 1 tap"),
        ({"student": [x, x], "teacher": [x]}, ValueError, "teacher must be like student: 2 tap"),
        ({"student": [], "teacher": []}, ValueError, "student must be at least one tap"),
        ({"projector": torch.zeros(11, 4)}, ValueError, r"projector\[0\] must be of shape \[D_teacher, 11\]"),
        ({"projector": torch.zeros(4, 11)}, ValueError, r"teacher\[0\] must be of shape \[6, 4\]"),
        ({"mask": torch.ones(6)}, TypeError, r"mask\[0\] must be a bool tensor"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask\[0\] must be of shape \[6\]"),
        ({"weight": math.nan}, ValueError, r"weight\[0\] must be a finite number"),
        ({"weight": "a"}, TypeError, r"weight\[0\] must be a number"),
        ({"weight": torch.ones(2)}, ValueError, "weight must be .*1 values"),
        ({"student": [x, x], "teacher": [x, x], "weight": [1.0]}, ValueError, "weight must be .*sequence of 2"),
        ({"teacher": torch.zeros(6, 11, device=META)}, ValueError, r"teacher\[0\] must be on cpu"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ]
    return _matches("feature_loss", cases)


def mfd_loss() -> list[ErrorInput]:
    """The valid call has features 3 x [6, 5], head [11, 5] and teacher logits [6, 11]."""
    six = torch.zeros(6, dtype=torch.int64)
    cases: list[tuple[Arguments, type[Exception], str]] = [
        ({"features": []}, ValueError, "features must be at least one modality"),
        ({"query": torch.zeros(4)}, ValueError, r"query must be of shape \[5\]"),
        ({"head_weight": torch.zeros(11, 4)}, ValueError, r"head_weight must be of shape \[C, 5\]"),
        ({"head_weight": None}, TypeError, "head_weight must be a tensor"),
        ({"head_weight": sparse(11, 5)}, TypeError, "head_weight must be a dense tensor, got a sparse_coo"),
        ({"teacher_logits": QUANTISED}, TypeError, "teacher_logits must be a float16.*got a quint8"),
        ({"teacher_pool_weights": sparse(6, 3)}, TypeError, "teacher_pool_weights must be a dense tensor"),
        ({"head_bias": torch.zeros(10)}, ValueError, r"head_bias must be of shape \[11\]"),
        ({"teacher_logits": torch.zeros(6, 10)}, ValueError, r"teacher_logits must be of shape \[6, 11\]"),
        ({"teacher_logits": torch.zeros(6, 11).int()}, TypeError, "teacher_logits must be .*got a int32"),
        ({"labels": six + 11}, ValueError, r"labels must be in \[0, 11\) or ignore_index, got 11 in row 0"),
        ({"labels": six.int()}, TypeError, "labels must be a int64 tensor"),
        ({"hard_weight": 1.0}, ValueError, "labels must be given when hard_weight is not 0"),
        ({"feature_weight": 1.0}, ValueError, "teacher_features must be given when feature_weight is not 0"),
        ({"teacher_features": torch.zeros(6, 4)}, ValueError, r"teacher_features must be of shape \[6, 5\]"),
        ({"feature_kind": "l2"}, ValueError, "feature_kind must be one of 'mse', 'smooth_l1', 'cosine'"),
        ({"pool_weight": 1.0}, ValueError, "teacher_pool_weights must be given when pool_weight is not 0"),
        ({"teacher_pool_weights": torch.zeros(6, 2)}, ValueError, r"teacher_pool_weights must be of shape \[6, 3\]"),
        ({"pool_temperature": 0.0}, ValueError, "pool_temperature must be a finite number > 0"),
        ({"pool_scale": "x"}, TypeError, "pool_scale must be a number or None"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0"),
        ({"present": torch.ones(6, 3)}, TypeError, "present must be a bool tensor"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask must be of shape \[6\]"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must be of shape \[6\]"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"soft_weight": math.nan}, ValueError, "soft_weight must be a finite number"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing must be in"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ]
    return _matches("mfd_loss", cases)


def linear_distill_loss() -> list[ErrorInput]:
    """The valid call has hidden states [6, 5] and [6, 7] and heads [11, 5] and [11, 7]."""
    six = torch.zeros(6, dtype=torch.int64)
    topk = mfd.TopK(torch.zeros(6, 2), torch.tensor([[0, 1]] * 6))
    cases: list[tuple[Arguments, type[Exception], str]] = [
        ({"student_hidden": [1.0]}, TypeError, "student_hidden must be a tensor, got list"),
        ({"student_hidden": torch.tensor(1.0)}, ValueError, r"student_hidden must be of shape \[\.\.\., H\]"),
        ({"student_hidden": sparse(6, 5)}, TypeError, "student_hidden must be a dense tensor, got a sparse_coo"),
        ({"student_weight": None}, TypeError, "student_weight must be a tensor, got NoneType"),
        ({"student_weight": torch.zeros(11, 4)}, ValueError, r"student_weight must be of shape \[C, 5\]"),
        (
            {"student_weight": torch.zeros(12, 5), "student_bias": None},
            ValueError,
            "teacher must have as many classes as student",
        ),
        ({"student_weight": torch.zeros(11, 5, device=META)}, ValueError, "student_weight must be on cpu"),
        ({"student_bias": torch.zeros(10)}, ValueError, r"student_bias must be of shape \[11\]"),
        ({"teacher_hidden": None}, TypeError, "teacher_hidden must be a tensor, got NoneType"),
        ({"teacher_hidden": None, "teacher_weight": None}, TypeError, "teacher_hidden must be .*soft_weight is not"),
        ({"teacher_hidden": torch.zeros(5, 7)}, ValueError, r"teacher_hidden must be of shape \[6, 'H'\]"),
        ({"teacher_hidden": [torch.zeros(6, 7)] * 2}, TypeError, "teacher_hidden must be one teacher's tensor"),
        ({"teacher_hidden": topk}, TypeError, "teacher_hidden must be a tensor, got TopK"),
        ({"teacher_hidden": torch.zeros(6, 12), "teacher_weight": None}, ValueError, "teacher must have as many"),
        ({"teacher_weight": torch.zeros(11, 6)}, ValueError, r"teacher_weight must be of shape \[C, 7\]"),
        (
            {"teacher_hidden": torch.zeros(6, 11), "teacher_weight": None, "teacher_bias": torch.zeros(11)},
            ValueError,
            "teacher_bias must be None where teacher_weight is None",
        ),
        ({"labels": six + 11}, ValueError, r"labels must be in \[0, 11\) or ignore_index, got 11 in row 0"),
        ({"hard_weight": 1.0}, ValueError, "labels must be given when hard_weight is not 0"),
        ({"divergence": "dkd"}, ValueError, "labels must be given for"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask must be of shape \[6\]"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must be of shape \[6\]"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer replaces the row count"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be None or an int >= 1"),
        ({"chunk_rows": 2.0}, ValueError, "chunk_rows must be None or an int >= 1"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ]
    return _matches("linear_distill_loss", cases)
