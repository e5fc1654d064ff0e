"""The two tiers of the battery: ``quick`` proves every combination once, ``rest`` is everything else.

A test without parameters is quick. Of a test with parameters, quick takes so many cases that each value of each
parameter is there with each value of ``backend`` and of ``record``, where the test has them. Markers say otherwise:

    @pytest.mark.quick                        every case
    @pytest.mark.quick("backend", "name")     every combination of the values of these parameters
    @pytest.mark.rest                         no case

That of a function counts before that of its file (``pytestmark``). `rest` on one `pytest.param` leaves out its cases.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable
from typing import Any

import pytest

TIERS = ("quick", "rest", "all")
#: What every other parameter is combined with.
MAIN = ("backend", "record")

Case = dict[str, Any]
#: Names of parameters with their values.
Combination = tuple[tuple[str, Hashable], ...]


def key(value: Any) -> Hashable:
    """The same for values that are the same: by value where that is safe, else by name, else by identity."""
    if value is None or isinstance(value, (str, int, float, complex)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return tuple(key(v) for v in value)
    return getattr(value, "name", None) or getattr(value, "__name__", None) or id(value)


def combinations(case: Case, product: tuple[str, ...]) -> Iterable[Combination]:
    """What a case shows: one combination of the parameters in ``product``, else each value beside those of ``MAIN``."""
    if product:
        yield tuple((name, key(case[name])) for name in product)
        return
    for name in case:
        for main in [m for m in MAIN if m in case and m != name] or [name]:
            yield tuple(sorted({(main, key(case[main])), (name, key(case[name]))}))


def covering(cases: list[Case], product: tuple[str, ...] = ()) -> list[int]:
    """Few of the cases, in order, that show together what all of them show."""
    shown = [frozenset(combinations(case, product)) for case in cases]
    missing = set(itertools.chain.from_iterable(shown))
    # What a case adds never grows: one that adds most by an old count is counted anew and, if still ahead, taken.
    queue = [(-len(s), i) for i, s in enumerate(shown)]
    heapq.heapify(queue)
    chosen = []
    while missing:
        _, i = heapq.heappop(queue)
        adds = len(shown[i] & missing)
        if queue and (-adds, i) > queue[0]:
            heapq.heappush(queue, (-adds, i))
            continue
        chosen.append(i)
        missing -= shown[i]
    return sorted(chosen)


def marks_of_parameters(item: pytest.Item) -> Iterable[pytest.Mark]:
    """What its `pytest.param` are marked with."""
    return item.callspec.marks if hasattr(item, "callspec") else ()


def quick_of_a_test(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those of the cases of one test function that are quick."""
    items = [item for item in items if all(mark.name != "rest" for mark in marks_of_parameters(item))]
    if not items:
        return []
    mark = next((mark for mark in items[0].iter_markers() if mark.name in ("quick", "rest")), None)
    if mark is not None and mark.name == "rest":
        return []
    cases = [dict(item.callspec.params) if hasattr(item, "callspec") else {} for item in items]
    if not any(cases) or (mark is not None and not mark.args):
        return items
    return [items[i] for i in covering(cases, mark.args if mark is not None else ())]


def quick(items: list[pytest.Item]) -> set[str]:
    """The names (node ids) of the quick ones among ``items``."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.split("[", 1)[0], []).append(item)
    return {item.nodeid for cases in tests.values() for item in quick_of_a_test(cases)}


def keep(config: pytest.Config, items: list[pytest.Item], tier: str) -> None:
    """Deselects what is not of ``tier``."""
    if tier == "all":
        return
    chosen = quick(items)
    kept = [item for item in items if (item.nodeid in chosen) == (tier == "quick")]
    left = [item for item in items if (item.nodeid in chosen) != (tier == "quick")]
    config.hook.pytest_deselected(items=left)
    items[:] = kept
