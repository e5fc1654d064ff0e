"""Plans of calls on Triton: the launches of a call are written down once, and later made without Python.

To write them down, the launch side runs once more after the call's own run, with launches that only look up the
compiled kernel. Each address that a kernel gets is traced to an argument of the call or to an output or scratch memory
that the launch side has allocated, and each number to one of the call's: they stand in for others, of which the traces
must be the same. A later call makes the allocations, packs the parameters as Triton's launcher would, and starts the
kernels through the driver (csrc/bindings/plans/program.cpp). What Triton's key looks at beside shapes, strides and
options, the alignment of pointers and the device, is looked at in each call; a profiler's launch hooks take Triton's
own road.

No plan is left where anything else takes part: a copy of an argument, an operation of PyTorch that writes, a kernel
with more than one block to a cluster or with scratch memory of Triton's, or a Triton whose internals are others.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import allocate
from ..layout import extent_bytes
from ..plans import Places, native_module
from . import interpreting
from .launch import compile_options, head_gradient, interpret, recording

CONSTANT, INPUT, BUFFER, NUMBER, LOW = range(5)  # where a parameter comes from: From of program.cpp
#: Bytes of Triton's types of numbers.
SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u1": 1, "u8": 1, "u16": 2, "u32": 4, "u64": 8}
FLOATS = {"fp32": "f", "f32": "f", "fp64": "d"}
DLPACK = {torch.bool: 6, torch.bfloat16: 4} | dict.fromkeys((torch.float16, torch.float32, torch.float64), 2)

#: Of the arguments of a call with a plan: writing it down allocates outputs once more.
MOST_BYTES = 1 << 26

#: Interpreted calls leave plans only where a test asks for them.
of_interpreter = False


class UnplannedError(Exception):
    """A call that cannot be written down."""


class Traced(NamedTuple):
    """``origin``; which one of its kind; an offset in bytes, or the bits of a constant; bytes."""

    origin: int
    number: int
    bits: int
    size: int


class TracedLaunch(NamedTuple):
    kernel: Any  # compiled: it owns the function
    function: int
    programs: int
    threads: int
    shared: int
    parameters: list[Traced]


class TracedView(NamedTuple):
    """A tensor of an interpreted launch: elements from the beginning of an argument or of an allocation."""

    origin: int
    number: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Interpreted(NamedTuple):
    """An interpreted launch, whose tensors are views and whose traced numbers are parameters."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    def __call__(self, inputs: list[Tensor], buffers: list[Tensor], numbers: list[float]) -> None:
        def filled(value: Any) -> Any:
            if isinstance(value, TracedView):
                base = (inputs if value.origin == INPUT else buffers)[value.number]
                return base.as_strided(value.shape, value.stride, base.storage_offset() + value.offset)
            if isinstance(value, Traced):
                return _number(numbers[value.number], value.origin, value.size)
            return _rebuilt(value, filled)

        interpret(self.kernel, self.programs, {name: filled(value) for name, value in self.arguments.items()})


class HeadProduct(NamedTuple):
    """:func:`head_gradient` of two allocations."""

    dz: int
    y: int
    classes: int
    dtype: torch.dtype

    def __call__(self, inputs: list[Tensor], buffers: list[Tensor], numbers: list[float]) -> Tensor:  # noqa: ARG002
        return head_gradient(buffers[self.dz], buffers[self.y], self.classes, self.dtype)


class Written(NamedTuple):
    """What is the same in all calls of a plan; ``buffers``: DLPack code, bits and shape, no bits for a product's."""

    buffers: list[tuple[int, int, tuple[int, ...]]]
    steps: list[tuple[Any, ...]]
    results: Any


class Recording(TorchDispatchMode):
    """Writes down the launches of this thread; operations of PyTorch are watched, and may not write."""

    def __init__(self, inputs: Sequence[Tensor], numbers: Sequence[float]) -> None:
        super().__init__()
        self.inputs, self.numbers = inputs, numbers
        self.buffers: list[Tensor] = []
        self.made: list[Any] = []  # kept, so that no address is used twice
        self.steps: list[Any] = []
        self.products: set[int] = set()
        self.used: set[int] = set()
        ranges = sorted((t.data_ptr(), t.data_ptr() + extent_bytes(t)) for t in inputs)
        if any(end > start for (_, end), (start, _) in itertools.pairwise(ranges)):
            raise UnplannedError("arguments overlap")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise UnplannedError(f"{func} writes")
        out = func(*args, **(kwargs or {}))
        self.made.append(out)
        if func.overloadpacket is torch.ops.aten.empty:
            self.buffers.append(out)
        return out

    def run(self, call: Callable[[], Any]) -> Written:
        """Of ``call()``, whose results are tensors it has allocated, in tuples and lists."""
        before, recording.current = recording.current, self
        try:
            with torch.no_grad(), allocate.unhooked(), self:
                results = call()
        finally:
            recording.current = before
        if not self.steps:
            raise UnplannedError("nothing is launched")

        written = set(self.used)

        def number_of(result: Any) -> Any:
            if result is None:
                return None
            if not isinstance(result, Tensor):
                return _rebuilt(result, number_of, plain=True)
            origin, number, offset = self._place(result)
            like = self.buffers[number] if origin == BUFFER else None
            if like is None or number not in written or offset or not result.is_contiguous():
                raise UnplannedError("a result comes from elsewhere")
            if result.shape != like.shape or result.dtype != like.dtype:
                raise UnplannedError("a result comes from elsewhere")
            return number

        shapes = [
            (0, 0, ()) if k in self.products else (DLPACK.get(b.dtype, 0), 8 * b.itemsize, tuple(b.shape))
            for k, b in enumerate(self.buffers)
        ]
        return Written(shapes, self.steps, number_of(results))

    def launch(self, kernel: Any, programs: int, warps: int, arguments: dict[str, Any], more: dict[str, Any]) -> None:
        if interpreting():
            self.steps.append(Interpreted(kernel, programs, {k: self._traced(v) for k, v in arguments.items()}))
            return
        compiled = kernel.run(grid=(programs,), warmup=True, **arguments, **compile_options(warps) | more)
        metadata, (warps, blocks, shared, *cluster) = compiled.metadata, compiled.packed_metadata
        extra = (
            *("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size", "gsan"),
            *("tensordesc_meta",),
        )
        if blocks != 1 or any(size != 1 for size in cluster) or any(getattr(metadata, name, None) for name in extra):
            raise UnplannedError("more than a plain launch")
        parameters: list[Traced] = []
        for name, kind in compiled.src.signature.items():
            self._parameters(arguments[name], kind, parameters)
        parameters += [Traced(CONSTANT, 0, 0, 8)] * 2  # scratch memory of Triton's: none
        self.steps.append(TracedLaunch(compiled, compiled.function, programs, 32 * warps, shared, parameters))

    def product(self, dz: Tensor, y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
        places = [self._place(t) for t in (dz, y)]
        if any(origin != BUFFER or offset for origin, _, offset in places):
            raise UnplannedError("a product of arguments")
        out = torch.empty((classes, y.shape[1]), dtype=dtype, device=y.device)
        number = len(self.buffers) - 1
        self.products.add(number)
        self.used.add(number)
        self.steps.append((HeadProduct(places[0][1], places[1][1], classes, dtype), number))
        return out

    def _place(self, tensor: Tensor) -> tuple[int, int, int]:
        """(origin, number, offset in bytes)."""
        address = tensor.data_ptr()
        for origin, known in ((INPUT, self.inputs), (BUFFER, self.buffers)):
            for k, base in enumerate(known):
                if base.data_ptr() <= address < base.data_ptr() + extent_bytes(base):
                    if origin == BUFFER:
                        self.used.add(k)
                    return origin, k, address - base.data_ptr()
        raise UnplannedError("a kernel reads something else")

    def _float(self, value: float) -> tuple[int, int] | None:
        """(origin, number) of a number of the call; None for a constant."""
        for k, number in enumerate(self.numbers):
            if number and value in (number, _number(number, NUMBER, 4)):
                return NUMBER, k
            if number and value == _number(number, LOW, 4):
                return LOW, k
        return None

    def _parameters(self, value: Any, kind: Any, into: list[Traced]) -> None:
        if isinstance(kind, (tuple, list)):
            for one, of_one in zip(value, kind, strict=True):
                self._parameters(one, of_one, into)
        elif kind == "constexpr":
            return
        elif kind.startswith("*"):
            into.append(Traced(*self._place(value), 8))
        elif kind in FLOATS:
            size, traced = struct.calcsize(FLOATS[kind]), self._float(value)
            bits = int.from_bytes(struct.pack(FLOATS[kind], value), "little")
            into.append(Traced(CONSTANT, 0, bits, size) if traced is None else Traced(*traced, 0, size))
        else:
            into.append(Traced(CONSTANT, 0, int(value) & (1 << 8 * SIZES[kind]) - 1, SIZES[kind]))

    def _traced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            origin, k, offset = self._place(value)
            return TracedView(origin, k, offset // value.itemsize, tuple(value.shape), value.stride())
        if isinstance(value, float):
            traced = self._float(value)
            size = 4 if value != _number(value, NUMBER, 4) else 8
            return value if traced is None else Traced(*traced, 0, size if traced[0] == NUMBER else 4)
        return _rebuilt(value, self._traced)


def _rebuilt(value: Any, each: Callable[[Any], Any], plain: bool = False) -> Any:
    """A tuple or a list of ``each`` of its elements; ``plain``: a tuple is no other kind of tuple."""
    if isinstance(value, tuple) and hasattr(value, "_fields") and not plain:
        return type(value)(*map(each, value))
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(map(each, value))
    return value


def _number(value: float, origin: int, size: int) -> float:
    """What a kernel gets of a number: all of it, rounded to float32, or what that rounding loses."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return value - rounded if origin == LOW else rounded if size == 4 else value


def can_plan(places: Places) -> bool:
    """Whether :func:`plan` may be asked."""
    return (of_interpreter or not interpreting()) and sum(t.nbytes for t in places.given) <= MOST_BYTES


def write(inputs: Sequence[Tensor], of: Callable[[Any], Callable[[], Any]], probes: Sequence[Any]) -> Any:
    """The native program of the launches of ``of(problem)()`` for two (numbers, problem) that stand for each call."""
    found = [Recording(inputs, numbers).run(of(problem)) for numbers, problem in probes]
    if any(other != found[0] for other in found[1:]):
        raise UnplannedError("a constant depends on a number")
    buffers, steps, results = found[0]
    if any(code == 0 and bits == 8 for code, bits, _ in buffers):
        raise UnplannedError("a dtype that is not known")
    listed = [(s, -1) if isinstance(s, Interpreted) else s if len(s) == 2 else (*s[:5], list(s[5])) for s in steps]
    return native_module().Program(list(inputs), buffers, listed, results)


class WrittenBackward(NamedTuple):
    """``of(problem)()`` launches it; ``inputs`` beside the call's own, the upstream gradient last; which gradients."""

    of: Callable[[Any], Callable[[], Any]]
    inputs: Sequence[Tensor]
    needs: tuple[bool, ...]


def plan(
    places: Places,
    dtype: torch.dtype,
    forward: Callable[[Any], Callable[[], Any]],
    labels: tuple[int, int, int, int] = (-1, -1, 0, 0),
    *,
    scale: Callable[[Sequence[Tensor], Tensor], None] | None = None,
    gradients: Sequence[Tensor] = (),
    backward: WrittenBackward | None = None,
) -> Any:
    """The native plan of a call that :func:`can_plan`; None: it cannot have one.

    ``forward(problem)()`` launches it and returns its results; ``scale`` multiplies ``gradients``, tensors like those
    of its results, by a 0-d tensor of ``dtype``. ``labels``: :func:`~mfd_fast.backends.plans.label_places`.
    """
    module = native_module()
    try:
        if not module.has_driver():
            module.use_driver("" if interpreting() else "libcuda.so.1")
        probes = [places.probed(k) for k in range(2)]
        written = write(places.given, forward, probes)
        of_scale = of_backward = None
        if scale is not None and gradients:
            factor = torch.empty((), dtype=dtype, device=gradients[0].device)
            launches = lambda _: lambda: (scale(gradients, factor), ())[1]  # noqa: E731
            try:
                of_scale = write([*gradients, factor], launches, [((), None)])
            except UnplannedError:  # interpreted, of bfloat16
                of_scale = None
        if backward is not None and any(backward.needs):
            of_backward = write([*places.given, *backward.inputs], backward.of, probes)
    except (UnplannedError, AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        return None
    needs = None if backward is None else backward.needs
    return module.ProgramPlan(
        written, places.ranges(dtype), places.number_arguments(), labels, of_backward, needs, of_scale
    )
