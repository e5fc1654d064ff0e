"""The tolerance rule over many draws: on few numbers its maximum is luck, pooled errors are a statistic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import Arguments, OpRecord, assert_obeys_rule, evaluate, on, reference64, stacked
from on_device import ON_GPU
from torch import Tensor

#: How many times as many draws judge a case that few draws fail: whose maximum of a few numbers is the smaller by luck
#: depends on the processor. On a GPU, whose time is short, as many once more.
MORE = (2,) if ON_GPU else (4, 64)


def eager_outputs(record: OpRecord, arguments: Arguments) -> dict[str, Tensor]:
    found = record.eager(**arguments)
    return found if isinstance(found, dict) else {"loss": found}


def assert_draws_obey_rule(
    record: OpRecord,
    backend: str,
    arguments_of: Callable[[int], Arguments],
    few: int,
    context: str,
    *,
    without: tuple[str, ...] = (),
    **options: Any,
) -> None:
    """``arguments_of(seed)`` of the first ``few`` seeds, pooled, or else of more, by the same rule.

    A fault is in every pool; what one maximum is by luck grows rarer with each.

    ``without`` names outputs that are not compared, ``options`` are those of :func:`harness.evaluate`.
    """
    actual, exact, eager = [], [], []

    def judge(seeds: range) -> None:
        for seed in seeds:
            arguments = arguments_of(seed)
            eager.append(evaluate(record, lambda **a: eager_outputs(record, a), arguments, **options))
            exact.append(reference64(record, arguments, **options))
            actual.append(evaluate(record, on(record, backend), arguments, **options))
            for result in (actual[-1], exact[-1]):
                for name in without:
                    result.outputs.pop(name, None)
        assert_obeys_rule(*(stacked(r) for r in (actual, exact, eager)), context)

    judged = 0
    for times in (1, *MORE):
        try:
            judge(range(judged, times * few))
            break
        except AssertionError:
            if times == MORE[-1]:
                raise
        judged = times * few
