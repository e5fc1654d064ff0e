"""What a GPU's driver is asked to launch by Triton's own launcher and by plans: ``python triton_launches.py FOLDER``.

Runs in a process of its own, without the interpreter, and with LD_LIBRARY_PATH and TRITON_LIBCUDA_PATH naming FOLDER,
where :func:`build` has put a driver. Prints, for every call, whether a plan ran and whether the launches, byte by byte,
and the results are the same.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u8": 1, "u32": 4, "u64": 8, "fp32": 4, "fp64": 8}
SEEN = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)


def build(folder):
    """The driver, and the environment of a process that finds it."""
    library = Path(folder) / "libcuda.so.1"
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-O1", "-Wall", "-Werror"]
    subprocess.run([*command, str(HERE / "fake_driver.c"), "-o", str(library)], check=True)
    link = library.with_name("libcuda.so")  # the name that Triton 3.5 links
    if not link.exists():
        link.symlink_to(library.name)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    search = os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")])
    return environment | {
        "LD_LIBRARY_PATH": search,
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(Path(folder) / "cache"),
    }


def flat(kind):
    if isinstance(kind, (tuple, list)):
        return [leaf for each in kind for leaf in flat(each)]
    return [] if kind == "constexpr" else [kind]


class Launches:
    """Every launch as (kernel, programs, threads, shared bytes, parameters); addresses by what they address."""

    def __init__(self, folder):
        self.kinds = {}  # of a kernel's parameters, by its handle
        self.seen = []
        self._callback = SEEN(self._see)
        self._library = ctypes.CDLL(str(Path(folder) / "libcuda.so.1"))
        self._library.set_seen(self._callback)

    def launcher(self, src, metadata):
        """Triton's own, which also learns the parameters of a kernel."""
        from triton.backends.nvidia.driver import CudaLauncher

        self.kinds[metadata.function] = (src.fn.fn.__name__, [k for kind in src.signature.values() for k in flat(kind)])
        return CudaLauncher(src, metadata)

    def _see(self, function, programs, threads, shared, parameters):
        name, kinds = self.kinds[function]
        values = []
        for k, kind in enumerate([*kinds, "u64", "u64"]):
            size = 8 if kind.startswith("*") else SIZES[kind]
            bits = int.from_bytes(ctypes.string_at(parameters[k], size), "little")
            values.append(("address" if kind.startswith("*") else kind, bits))
        self.seen.append((name, programs, threads, shared, values))


def canonical(launches, inputs, results):
    """Addresses as (argument, offset), or by the order in which they come."""
    names = {}

    def named(address):
        for k, t in enumerate(inputs):
            if t.data_ptr() <= address < t.data_ptr() + t.untyped_storage().nbytes():
                return f"argument {k} + {address - t.data_ptr()}"
        return names.setdefault(address, f"memory {len(names)}")

    found = [
        [*rest, [named(bits) if kind == "address" else bits for kind, bits in values]] for *rest, values in launches
    ]
    return found, [None if t is None else named(t.data_ptr()) for t in results]


def calls():
    """(name, op, arguments to learn from, arguments of the same kind with other numbers and addresses)."""
    import torch
    from plan_calls import head, labelled, logits, modalities, random, stacked, taps

    import mfd_fast as mfd

    def sized(rows, columns, dtype=torch.float32):
        return {"student": random(rows, columns, dtype=dtype).requires_grad_(), "teacher": random(rows, columns)}

    yield "distill_loss", mfd.distill_loss, logits, {"temperature": 3.0}
    yield "distill_loss with labels", mfd.distill_loss, labelled, {"temperature": 5.0, "soft_weight": 0.3}
    yield "distill_loss, own divisor", mfd.distill_loss, lambda: labelled() | {"normalizer": 7.0}, {"normalizer": 9.0}
    yield "distill_loss in bfloat16", mfd.distill_loss, lambda: sized(64, 100, torch.bfloat16), {}
    yield "distill_loss of many classes", mfd.distill_loss, lambda: sized(3, 5003), {}
    of_terms = {"ignored_labels": "term", "divergence": mfd.JSD(0.25)}
    yield "distill_loss by term", mfd.distill_loss, lambda: labelled() | of_terms, {"hard_weight": 2.0}
    in_double = {"student": random(6, 5, dtype=torch.float64).requires_grad_(), "weight": None}
    yield "distill_loss in float64", mfd.distill_loss, lambda: labelled() | in_double, {"temperature": 1.1}
    yield "feature_loss", mfd.feature_loss, taps, {"weight": [0.1, 0.7]}
    many = {
        "student": [random(8, 16).requires_grad_() for _ in range(12)],
        "teacher": [random(8, 16, seed=k) for k in range(12)],
    }
    yield "feature_loss of 12 taps", mfd.feature_loss, lambda: many, {"kind": "mse"}
    yield "modal_pool", mfd.modal_pool, modalities, {"temperature": 0.7}
    yield "modal_pool of stacked features", mfd.modal_pool, stacked, {}
    yield "mfd_loss", mfd.mfd_loss, head, {"temperature": 3.0, "feature_weight": 0.9, "pool_weight": 0.2}


def main(folder):
    sys.setdlopenflags(os.RTLD_LAZY)  # the driver has what is used, not all that Triton knows
    import torch
    from harness import map_tensors
    from plan_calls import tensors_in
    from triton import knobs
    from triton.backends.nvidia.driver import CudaUtils

    from mfd_fast.backends import allocate, plans
    from mfd_fast.bench import stubbed_triton
    from mfd_fast.testing import planned_calls, without_plans

    launches = Launches(folder)
    stubbed_triton.install(launches.launcher, CudaUtils(), str(Path(folder) / "libcuda.so.1"))

    def run(op, arguments):
        """The launches of a call and of its backward, and the results."""
        given = map_tensors(arguments, lambda t: t.detach().clone().requires_grad_(t.requires_grad))
        kept = []  # so that no address is used twice
        before = allocate.set_hook(lambda t: (kept.append(t), t)[1])
        launches.seen = []
        try:
            outputs = tensors_in(op(**given, backend="triton"))
            end = next(out for out in outputs if out.requires_grad)
            leaves = [t for t in tensors_in(list(given.values())) if t.requires_grad]
            upstream = torch.full_like(end, 3.0)
            found = torch.autograd.grad(end, leaves, upstream, allow_unused=True)
        finally:
            allocate.set_hook(before)
        inputs = [*tensors_in(list(given.values())), upstream]
        return canonical(launches.seen, inputs, [*outputs, *found])

    watched = []
    for name, op, arguments, changes in calls():
        plans.forget()
        with without_plans():
            expected = run(op, arguments() | changes)
        run(op, arguments())
        for watching in (False, True):
            hooks = knobs.runtime.launch_enter_hook
            if watching:
                name += " that a profiler watches"
                hooks.add(watched.append)
            before = planned_calls()
            found = run(op, arguments() | changes)
            hooks.remove(watched.append)
            answer = {"call": name, "planned": planned_calls() - before, "launches": len(found[0])}
            print(json.dumps(answer | {"expected": expected, "found": found}))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main(sys.argv[1])
