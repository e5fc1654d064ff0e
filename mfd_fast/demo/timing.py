"""Step time of mfd_fast beside plain PyTorch on this machine: checked first, run in turn, medians."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mfd_fast as mfd

from ..bench.timing import Step, interleaved
from .data import CLASSES, SENSORS, SIZES
from .models import FusionNet
from .train import Config

# Largest error of value and gradients against float64, relative to the largest entry, for float32 inputs.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds of one forward and backward. A time that was not taken is None, ``note`` says why."""

    what: str
    backend: str | None
    mfd_fast_ms: float | None
    eager_ms: float | None
    compile_ms: float | None
    note: str

    @property
    def eager_ratio(self) -> float | None:
        return None if self.eager_ms is None or self.mfd_fast_ms is None else self.eager_ms / self.mfd_fast_ms

    @property
    def compile_ratio(self) -> float | None:
        return None if self.compile_ms is None or self.mfd_fast_ms is None else self.compile_ms / self.mfd_fast_ms


def _as_given(*arguments: Any) -> tuple[Any, ...]:
    return arguments


@dataclass(frozen=True)
class TimedCall:
    """A call of a public op, and the function of the same signature that one would write without the library.

    ``prepare`` turns ``arguments`` into theirs and is timed with both: the encoders of a training step.
    """

    what: str
    op: Callable[..., Any]
    eager: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    prepare: Callable[..., tuple[Any, ...]] = _as_given

    def explain(self, backend: str | None) -> str:
        """The backend that runs the op; BackendError if ``backend`` cannot."""
        return mfd.explain(self.op, *self.prepare(*self.arguments), **self.options, backend=backend).backend


def eager_distill_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, hard_weight: float
) -> Tensor:
    """T² KL + labels, as it is usually written."""
    soft = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * soft + hard_weight * F.cross_entropy(student, labels)


def eager_mfd_loss(
    features: Sequence[Tensor], query: Tensor, head_weight: Tensor, head_bias: Tensor, teacher_logits: Tensor,
    labels: Tensor, *, teacher_features: Tensor, present: Tensor, bias: Tensor, temperature: float,
    hard_weight: float, feature_weight: float,
) -> Tensor:  # fmt: skip
    """Attention over the sensors, head, T² KL + labels + feature matching, as it is usually written."""
    stacked = torch.stack(list(features), -2)
    scores = stacked @ query * stacked.shape[-1] ** -0.5 + bias
    shares = F.softmax(scores.masked_fill(~present, -torch.inf), -1)
    pooled = (shares.unsqueeze(-1) * stacked).sum(-2)
    logits = F.linear(pooled, head_weight, head_bias)
    rows = eager_distill_loss(logits, teacher_logits, labels, temperature=temperature, hard_weight=hard_weight)
    return rows + feature_weight * F.mse_loss(pooled, teacher_features)


def encode(sensors: Sequence[Tensor], encoders: Sequence[Sequence[Tensor]], *rest: Any) -> tuple[Any, ...]:
    """The student's encoders, from their parameters (weight and bias of two layers each), and the ``rest`` as it is."""
    layers = zip(sensors, encoders, strict=True)
    return ([F.linear(F.gelu(F.linear(x, *layer[:2])), *layer[2:]) for x, layer in layers], *rest)


def workloads(config: Config, quick: bool) -> list[TimedCall]:
    """The student's step in this demo with and without its encoders, and logits of growing size."""
    shapes = ((64, 100),) if quick else ((1024, 1000), (512, 8192))
    loss = _fusion(config)
    return [_student_step(config, loss), loss, *(_logits(rows, classes) for rows, classes in shapes)]


def _student_step(config: Config, loss: TimedCall) -> TimedCall:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = FusionNet(SIZES, config.student_hidden, config.student_width, CLASSES)
        sensors = [torch.randn(config.batch, size) for size in SIZES]
    encoders = [list(encoder.parameters()) for encoder in student.encoders]
    arguments = (sensors, encoders, *loss.arguments[1:])
    return replace(loss, what=f"student step, {config.batch} rows", arguments=arguments, prepare=encode)


def _fusion(config: Config) -> TimedCall:
    rows, sensors, width = config.batch, len(SENSORS), config.student_width
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    present = torch.rand(rows, sensors, generator=generator) >= config.sensor_dropout
    present[:, 0] = True
    arguments = (
        [normal(rows, width).requires_grad_() for _ in range(sensors)],
        normal(width).requires_grad_(),
        normal(CLASSES, width).requires_grad_(),
        normal(CLASSES).requires_grad_(),
        normal(rows, CLASSES),
        torch.randint(CLASSES, (rows,), generator=generator),
    )
    options = {
        "teacher_features": normal(rows, width),
        "present": present,
        "bias": normal(sensors).requires_grad_(),
        "temperature": config.temperature,
        "hard_weight": 1.0,
        "feature_weight": config.feature_weight,
    }
    what = f"mfd_loss {rows}x{sensors}x{width}, {CLASSES}"
    return TimedCall(what, mfd.mfd_loss, eager_mfd_loss, arguments, options)


def _logits(rows: int, classes: int) -> TimedCall:
    generator = torch.Generator().manual_seed(0)
    arguments = (
        torch.randn(rows, classes, generator=generator).requires_grad_(),
        torch.randn(rows, classes, generator=generator),
        torch.randint(classes, (rows,), generator=generator),
    )
    options = {"temperature": 2.0, "hard_weight": 1.0}
    return TimedCall(f"distill_loss {rows}x{classes}", mfd.distill_loss, eager_distill_loss, arguments, options)


def check_backend(loads: Sequence[TimedCall], backend: str | None) -> None:
    """Raises the last BackendError if ``backend`` can run none of the workloads."""
    refusal = None
    for load in loads:
        try:
            load.explain(backend)
            return
        except mfd.BackendError as error:
            refusal = error
    if refusal is not None:
        raise refusal


def measure(load: TimedCall, backend: str | None, seconds: float, with_compile: bool = False) -> Timing:
    """Times mfd_fast and eager (and compiled eager) in turn for about ``seconds``, if their gradients agree."""
    try:
        chosen = load.explain(backend)
    except mfd.BackendError as error:
        return Timing(load.what, None, None, None, None, str(error))

    def fused(*arguments: Any, **options: Any) -> Tensor:
        result = load.op(*load.prepare(*arguments), **options, backend=backend)
        return result.loss if isinstance(result, mfd.MFDOutput) else result

    def eager(*arguments: Any, **options: Any) -> Tensor:
        return load.eager(*load.prepare(*arguments), **options)

    functions = [fused, eager]
    exact = value_and_gradients(eager, _double(load.arguments), _double(load.options))
    errors = [relative_error(value_and_gradients(f, load.arguments, load.options), exact) for f in functions]
    if not all(error <= TOLERANCE for error in errors):  # False for nan
        note = f"not timed: error against float64 is {errors[0]:.1e} (mfd_fast), {errors[1]:.1e} (eager)"
        return Timing(load.what, chosen, None, None, None, note)
    note = ""
    if with_compile:
        compiled = torch.compile(eager, dynamic=False)
        try:
            value_and_gradients(compiled, load.arguments, load.options)
            functions.append(compiled)
        except Exception as error:
            note = f"torch.compile failed: {type(error).__name__}"
    steps: dict[str, Step] = {
        str(i): partial(value_and_gradients, f, load.arguments, load.options) for i, f in enumerate(functions)
    }
    medians = [times.median for times in interleaved(steps, torch.device("cpu"), seconds, least=7).values()]
    return Timing(load.what, chosen, medians[0], medians[1], medians[2] if len(medians) > 2 else None, note)


def value_and_gradients(function: Callable[..., Tensor], arguments: Any, options: Any) -> tuple[Tensor, ...]:
    """The loss, and its gradient for every tensor that requires one."""
    loss = function(*arguments, **options)
    return (loss, *torch.autograd.grad(loss, _leaves([arguments, options])))


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest difference of a tensor's entries over its largest exact entry; nan if a tensor has one."""
    errors = [(f.double() - e).abs().max() / e.abs().max() for f, e in zip(found, exact, strict=True)]
    return torch.stack(errors).detach().max().item()


def _leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree] if tree.requires_grad else []
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for branch in tree for leaf in _leaves(branch)] if isinstance(tree, (list, tuple)) else []


def _double(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        wide = tree.detach().double() if tree.is_floating_point() else tree
        return wide.requires_grad_() if tree.requires_grad else wide
    if isinstance(tree, dict):
        return {key: _double(value) for key, value in tree.items()}
    return type(tree)(map(_double, tree)) if isinstance(tree, (list, tuple)) else tree
