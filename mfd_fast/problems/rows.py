"""The problem of the row losses: N rows of student and teacher logits, and what becomes of their two terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..codes import PADDING
from ..divergences import Divergence, ForwardKL
from ..types import LogitTransform, TopK
from .checks import (
    ANY_COLUMNS,
    REDUCTIONS,
    can_read,
    check_bool,
    check_choice,
    check_dense,
    check_device,
    check_divergence,
    check_floating,
    check_ignore_index,
    check_row_tensor,
    check_scalar,
    check_smoothing,
    check_temperature,
    check_transform,
    compute_dtype,
    counted_rows,
    flat,
    is_used,
    label_error,
    type_error,
    value_error,
)
from .problem import Problem
from .teachers import TopKRows, check_log_probabilities, check_teacher_weights, check_teachers, check_topk

Scalar = float | Tensor
Normalizer = Scalar | Sequence[Scalar] | None

#: What a label that is ignored takes away: the row, or its hard term alone.
IGNORED_LABELS = ("row", "term")


class RowProblem(Problem):
    """N rows of C classes of student and teacher logits with everything the row losses depend on.

    Built by :func:`check_rows`; backends trust it.

    Attributes:
        student, teachers: ``[..., Cs]`` and each ``[..., Ct]`` raw logits, any strides, one device. Almost always
            there is one teacher.
        temperature: float, or a tensor (0-d or contiguous ``[N]``) of ``dtype``.
        own_teacher_temperature: the same of the teacher's side, None where it is the student's.
        teacher_weights: ``[len(teachers)]`` or ``[N, len(teachers)]`` of ``dtype``, contiguous, >= 0 and summing to 1
            (``check_rows`` has normalised them, still in the graph); None: equal weights.
        labels, mask: ``[N]`` int64 / bool, contiguous, or None.
        indices: contiguous int64 ``[N, K]``, unchecked, of the classes of a sparse teacher, PADDING where a candidate
            only pads the list and its value may not be read; else None.
        topk: None, or the teacher holds ``[..., K]`` values of a sparse teacher. Its ``tail`` is "renormalize"
            where K = C and all are listed.
        divergence: canonical, so JSD has 0 < beta < 1 and the skewed ones 0 < lam < 1.
        ignored_labels: "term" only where there are labels, and of a divergence that does not need them.
        n_rows, classes: N, and the C columns used on both sides.
        dtype: dtype of the arithmetic and of the losses: float64 if either side is, else float32.
        op: name of the public function, for messages.
        student_transform, teacher_transform: None where the values are used as they are.
    """

    OPTIONS: ClassVar = {
        "op": "str",
        "classes": "SymInt",
        "dtype": "ScalarType",
        "divergence": "Divergence",
        "label_smoothing": "float",
        "ignore_index": "int",
        "ignored_labels": "str",
        "student_transform": "LogitTransform",
        "teacher_transform": "LogitTransform",
        "scale_by_temperature": "bool",
        "topk": "TopKRows",
    }
    SIZES = ("n_rows",)
    TENSORS = ("student", "temperature", "own_teacher_temperature", "teacher_weights", "labels", "mask", "indices")
    LISTS = ("teachers",)
    ARGUMENTS: ClassVar = {
        "own_teacher_temperature": "teacher_temperature",
        "indices": "teacher.indices",
        "teachers": "teacher",
    }

    op: str
    n_rows: int
    classes: int
    dtype: torch.dtype
    divergence: Divergence
    label_smoothing: float
    ignore_index: int
    ignored_labels: str
    student_transform: LogitTransform | None
    teacher_transform: LogitTransform | None
    scale_by_temperature: bool
    topk: TopKRows | None
    student: Tensor
    temperature: Scalar
    own_teacher_temperature: Scalar | None
    teacher_weights: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    indices: Tensor | None
    teachers: Sequence[Tensor]

    def measure(self) -> None:
        # torch.Size.numel would make a plain int of the sizes that torch.compile leaves open.
        self.n_rows = math.prod(self.student.shape[:-1])

    @property
    def teacher(self) -> Tensor:
        return self.teachers[0]

    @property
    def teacher_temperature(self) -> Scalar:
        own = self.own_teacher_temperature
        return self.temperature if own is None else own

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def columns(self) -> int:
        return self.classes

    @property
    def elements(self) -> int | None:
        plain = type(self.divergence) is ForwardKL and self.topk is None and len(self.teachers) == 1
        if not plain or self.student.dtype != torch.float32 or self.teacher.dtype != torch.float32:
            return None
        return 2 * self.n_rows * self.classes

    def counted(self) -> Tensor | None:
        """Bool ``[N]``, True where a row exists; None when all do."""
        return self.mask if self.ignored_labels == "term" else self.labelled()

    def labelled(self) -> Tensor | None:
        """Bool ``[N]``, True where a row exists and its label is not ignored; None when that is so of all."""
        return counted_rows(self.mask, self.labels, self.ignore_index)

    @property
    def candidates(self) -> Tensor | None:
        """Bool ``[N, K]``, False where a candidate only pads the list; None where none does."""
        if self.topk is None or self.indices is None or not self.topk.padded:
            return None
        return self.indices != PADDING

    def lists_all_classes(self) -> Tensor | None:
        """Bool ``[N, 1]``, True where padded lists of C candidates have all classes; None where no row can."""
        candidates = self.candidates
        if candidates is None or candidates.shape[-1] != self.classes:
            return None
        return candidates.all(-1, keepdim=True)

    def without_teacher(self) -> RowProblem:
        """The same rows where the teacher has no part in the loss: the detached student stands in its place."""
        return self.replace(
            divergence=ForwardKL(),
            teachers=[self.student.detach()],
            teacher_weights=None,
            topk=None,
            indices=None,
            teacher_transform=self.student_transform,
            own_teacher_temperature=None,
        )

    def member(self, argument: str, index: int) -> str:
        if argument == "teacher" and len(self.teachers) == 1:
            return argument
        return super().member(argument, index)


class RowLoss(Problem):
    """What becomes of the two terms of every row: weight · (soft_weight · soft + hard_weight · hard), reduced.

    ``weight``: ``[N]`` of the rows' dtype, contiguous, or None. ``normalizer``: replaces the row count of "mean".
    ``hard_normalizer``: the same of the hard term, None where it is that of the other terms.
    """

    OPTIONS: ClassVar = {"reduction": "str"}
    TENSORS = ("weight", "soft_weight", "hard_weight", "normalizer", "hard_normalizer")
    ZERO = ("soft_weight", "hard_weight")
    ARGUMENTS: ClassVar = {"hard_normalizer": "normalizer[1]"}

    reduction: str
    weight: Tensor | None
    soft_weight: Scalar
    hard_weight: Scalar
    normalizer: Scalar | None
    hard_normalizer: Scalar | None

    @property
    def use_soft(self) -> bool:
        return is_used(self.soft_weight)

    @property
    def use_hard(self) -> bool:
        return is_used(self.hard_weight)

    def folded(self) -> RowLoss:
        """The same loss with each term's normalizer in its weight, where they differ."""
        if self.hard_normalizer is None or self.normalizer is None:
            return self
        pairs = ((self.soft_weight, self.normalizer), (self.hard_weight, self.hard_normalizer))
        soft, hard = (weight / by if is_used(weight) else weight for weight, by in pairs)
        return self.replace(reduction="sum", normalizer=None, hard_normalizer=None, soft_weight=soft, hard_weight=hard)

    def counts_apart(self, rows: RowProblem) -> bool:
        """Whether the hard term is divided by something else than the other terms."""
        if self.reduction != "mean" or self.hard_normalizer is not None:
            return self.hard_normalizer is not None
        return rows.ignored_labels == "term" and self.normalizer is None


def check_class_dimension(op: str, argument: str, value: object, shape: torch.Size) -> None:
    """Logits ``[B, C, ...]``, as ``F.cross_entropy`` has them, show in what has one value per row."""
    if isinstance(value, Tensor) and len(shape) > 2 and value.shape == (shape[0], *shape[2:]) != shape[:-1]:
        raise ValueError(
            f"{op}: {argument} of shape {list(value.shape)} fits classes in dimension 1 of the student's "
            f"{list(shape)}, here they are the last: pass student.movedim(1, -1), and the teacher likewise"
        )


def check_rows(
    op: str,
    student: Tensor,
    teacher: Tensor | TopK | Sequence[Tensor],
    labels: Tensor | None,
    *,
    teacher_weights: Tensor | None = None,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    ignored_labels: str = "row",
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    scale_by_temperature: bool = True,
) -> RowProblem:
    """Checks the arguments that distill_loss and distill_terms share and brings them to one form."""
    student = check_floating(op, "student", student)
    if student.dim() < 1:
        raise value_error(op, "student", student, "of shape [..., C]")
    leading, device = student.shape[:-1], student.device
    teachers = check_teachers(op, teacher.values if isinstance(teacher, TopK) else teacher, leading, device)

    classes = check_transform(op, "student_transform", student_transform, student.shape[-1])
    for tensor in () if isinstance(teacher, TopK) else teachers:
        teacher_classes = check_transform(op, "teacher_transform", teacher_transform, tensor.shape[-1])
        if classes != teacher_classes:
            raise ValueError(
                f"{op}: teacher must have as many classes as student, got {teacher_classes} and {classes}; "
                "for padded heads pass LogitTransform(classes=...) for the wider side"
            )
    if classes < 1:
        raise value_error(op, "student", student, "of shape [..., C] with C >= 1")

    dtype = compute_dtype(student, *teachers)
    for name, value in (("labels", labels), ("mask", mask)):
        check_class_dimension(op, name, value, student.shape)
    if labels is not None:
        labels = flat(check_row_tensor(op, "labels", labels, leading, device, torch.int64))
    if mask is not None:
        mask = flat(check_row_tensor(op, "mask", mask, leading, device, torch.bool))
    ignore_index = check_ignore_index(op, ignore_index)
    check_choice(op, "ignored_labels", ignored_labels, IGNORED_LABELS)
    exists = (mask, None if ignored_labels == "term" else labels, ignore_index)
    temperature = check_temperature(op, "temperature", temperature, leading, device, dtype, *exists)
    if teacher_temperature is not None:
        teacher_temperature = check_temperature(
            op, "teacher_temperature", teacher_temperature, leading, device, dtype, *exists
        )
    divergence = check_divergence(op, divergence, labels)
    if ignored_labels == "term" and divergence.needs_labels:
        raise ValueError(
            f"{op}: ignored_labels must be 'row' for {divergence.name}, whose soft term needs the label, got 'term'"
        )
    topk = indices = None
    if isinstance(teacher, TopK):
        indices = check_dense(op, "teacher.indices", teacher.indices)
        check_device(op, "teacher.indices", indices, device)
        topk = check_topk(op, teacher, divergence, teacher_transform, classes)
        indices = indices.reshape(math.prod(leading), indices.shape[-1]).to(torch.int64).contiguous()
        if teacher.mask is not None:
            candidates = check_dense(op, "teacher.mask", teacher.mask)
            check_device(op, "teacher.mask", candidates, device)
            indices = torch.where(candidates.reshape(indices.shape), indices, PADDING).contiguous()
        check_log_probabilities(op, teacher, counted_rows(*exists))
    if teacher_weights is not None and not isinstance(teacher, Sequence):
        raise value_error(op, "teacher", teacher, "a sequence of tensors when teacher_weights is given")
    teacher_weights = check_teacher_weights(op, teacher_weights, len(teachers), leading, device, dtype, *exists)
    label_smoothing = check_smoothing(op, label_smoothing)
    check_bool(op, "scale_by_temperature", scale_by_temperature)
    return RowProblem(
        op=op,
        n_rows=math.prod(leading),
        classes=classes,
        dtype=dtype,
        divergence=divergence,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        ignored_labels="row" if labels is None else ignored_labels,
        student_transform=_changing(student_transform),
        teacher_transform=_changing(teacher_transform),
        scale_by_temperature=scale_by_temperature,
        topk=topk,
        student=student,
        temperature=temperature,
        own_teacher_temperature=teacher_temperature,
        teacher_weights=teacher_weights if len(teachers) > 1 else None,
        labels=labels,
        mask=mask,
        indices=indices,
        teachers=teachers,
    )


def _changing(transform: LogitTransform | None) -> LogitTransform | None:
    """None where the values are used as they are."""
    return transform if transform is not None and transform.changes_values else None


def check_reduction(
    op: str, reduction: object, normalizer: object, dtype: torch.dtype
) -> tuple[Scalar | None, Scalar | None]:
    """The normalizer, and that of the hard term where it has its own."""
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if normalizer is None:
        return None, None
    if reduction != "mean":
        raise ValueError(f"{op}: normalizer replaces the row count of reduction='mean', got {reduction!r}")
    if not isinstance(normalizer, (tuple, list)):
        return check_scalar(op, "normalizer", normalizer, positive=True, dtype=dtype), None
    if len(normalizer) != 2:
        raise value_error(op, "normalizer", normalizer, "a number, a 0-d tensor or a pair of them")
    pair = ((f"normalizer[{k}]", value) for k, value in enumerate(normalizer))
    soft, hard = (check_scalar(op, name, value, positive=True, dtype=dtype) for name, value in pair)
    return soft, hard


def check_weight(
    op: str, weight: object, leading: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """One factor per row as contiguous ``[N]`` of ``dtype``, still in the graph."""
    return None if weight is None else flat(check_row_tensor(op, "weight", weight, leading, device, None).to(dtype))


def check_labels_in_range(op: str, rows: RowProblem) -> None:
    """On a CPU only: elsewhere a bad label gives NaN for its row instead of a synchronisation."""
    if rows.labels is None or not can_read(rows.labels):
        return
    labels = rows.labels
    bad = (labels < 0) | (labels >= rows.classes)
    labelled = rows.labelled()
    if labelled is not None:
        bad &= labelled
    if bad.any():
        row = int(bad.nonzero()[0])
        raise label_error(op, row, int(labels[row]), rows.classes)


def check_indices(op: str, rows: RowProblem) -> None:
    """A TopK teacher's indices in the counted rows; on a CPU only, as :func:`check_labels_in_range`.

    In range, none twice in a row, and the label among them where the divergence needs it.
    """
    if rows.indices is None or not can_read(rows.indices):
        return
    indices, counted, candidates = rows.indices, rows.counted(), rows.candidates

    def first(bad: Tensor) -> int | None:
        """First counted row with a True."""
        found = bad.any(-1) if counted is None else bad.any(-1) & counted
        return int(found.nonzero()[0]) if found.any() else None

    pads = "" if candidates is not None else "; candidates that only pad the list are told by TopK(mask=...)"
    bad = (indices < 0) | (indices >= rows.classes)
    if candidates is not None:
        bad &= candidates
    row = first(bad)
    if row is not None:
        value = int(indices[row][bad[row]][0])
        raise ValueError(f"{op}: teacher.indices must be in [0, {rows.classes}), got {value} in row {row}{pads}")
    row = first(listed_twice(indices, candidates))
    if row is not None:
        ordered = (indices[row] if candidates is None else indices[row][candidates[row]]).sort().values
        value = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
        raise ValueError(f"{op}: teacher.indices must differ within a row, got {value} twice in row {row}{pads}")
    if rows.divergence.needs_labels and rows.labels is not None:
        elsewhere = indices != rows.labels[:, None]
        if candidates is not None:
            elsewhere |= ~candidates
        row = first(elsewhere.all(-1, keepdim=True))
        if row is not None:
            label = int(rows.labels[row])
            raise ValueError(
                f"{op}: {rows.divergence.name} needs the label among teacher.indices, got label {label} in row {row}"
            )


def listed_twice(indices: Tensor, candidates: Tensor | None) -> Tensor:
    """Bool ``[N, K - 1]`` with a True in every row that lists a class twice."""
    if candidates is not None:  # each of the others as a negative number of its own
        own = torch.arange(-indices.shape[-1], 0, device=indices.device)
        indices = torch.where(candidates, indices, own)
    ordered = indices.sort(-1).values
    return ordered[:, 1:] == ordered[:, :-1]


def check_row_loss(
    rows: RowProblem,
    soft_weight: Scalar,
    hard_weight: Scalar,
    weight: Tensor | None,
    reduction: str,
    normalizer: Normalizer,
) -> RowLoss:
    """Checks what distill_loss and mfd_loss do with the terms of checked rows."""
    op, dtype = rows.op, rows.dtype
    soft_weight = check_scalar(op, "soft_weight", soft_weight, dtype=dtype)
    hard_weight = check_scalar(op, "hard_weight", hard_weight, dtype=dtype)
    if rows.labels is None and is_used(hard_weight):
        raise value_error(op, "labels", None, "given when hard_weight is not 0")
    weight = check_weight(op, weight, rows.student.shape[:-1], rows.device, dtype)
    of_soft, of_hard = check_reduction(op, reduction, normalizer, dtype)
    return RowLoss(
        reduction=reduction,
        weight=weight,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        normalizer=of_soft,
        hard_normalizer=of_hard,
    )


class DistillProblem(Problem):
    """A checked distill_loss call."""

    PARTS = ("rows", "loss")

    rows: RowProblem
    loss: RowLoss

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of either side's logits."""
        return self.rows.student.shape[-1], self.rows.teacher.shape[-1]


def check_loss(
    op: str,
    student: Tensor,
    teacher: Tensor | TopK | Sequence[Tensor] | None,
    labels: Tensor | None,
    *,
    soft_weight: Scalar,
    hard_weight: Scalar,
    weight: Tensor | None,
    reduction: str,
    normalizer: Normalizer,
    return_parts: bool = False,
    **options: Any,
) -> DistillProblem:
    """The whole contract of distill_loss; ``options`` are those of :func:`check_rows`."""
    check_bool(op, "return_parts", return_parts)
    if teacher is None:
        check_absent_teacher(op, "teacher", soft_weight)
        check_transform(op, "teacher_transform", options["teacher_transform"], ANY_COLUMNS)
        options["teacher_transform"] = options["student_transform"]
        rows = check_rows(op, student, check_floating(op, "student", student), labels, **options).without_teacher()
    else:
        rows = check_rows(op, student, teacher, labels, **options)
    loss = check_row_loss(rows, soft_weight, hard_weight, weight, reduction, normalizer)
    if rows.ignored_labels == "term" and not (loss.use_soft and loss.use_hard):
        # With one term in all, whatever has no part in it does not exist.
        if loss.hard_normalizer is not None:
            normalizer = loss.hard_normalizer if loss.use_hard else loss.normalizer
            loss = loss.replace(normalizer=normalizer, hard_normalizer=None)
        rows = rows.replace(ignored_labels="row", labels=rows.labels if loss.use_hard else None)
    return DistillProblem(rows=rows, loss=loss)


def check_absent_teacher(op: str, argument: str, soft_weight: object) -> None:
    """TypeError unless the soft term has the number 0 as its weight."""
    if isinstance(soft_weight, Tensor) or soft_weight != 0:
        raise type_error(op, argument, None, "a tensor where soft_weight is not the number 0")
