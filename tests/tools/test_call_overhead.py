"""The suite `call overhead`: it measures every op on every backend here, and holds the CPU's calls to their limits."""

import json

import pytest
import torch

from mfd_fast.backends import plans
from mfd_fast.bench import call_overhead
from mfd_fast.testing import without_plans


def measured(op, rounds):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call_overhead.measure(op, "cpu", rounds)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(plans.missing() is not None, reason="plans need PyTorch's C table")
@pytest.mark.parametrize("op", call_overhead.LIMITS["cpu"])
@pytest.mark.rest
def test_no_call_costs_more_than_its_limit(op):
    """Least times of calls in turns: one quiet moment for each is enough, and on a busy machine it may be rare."""
    found = min((measured(op, 400) for _ in range(3)), key=lambda each: each.ratio)
    assert found.ratio <= call_overhead.LIMITS["cpu"][op], found


@pytest.mark.skipif(plans.missing() is not None, reason="plans need PyTorch's C table")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.rest
def test_no_call_costs_more_than_its_limit_where_nothing_is_launched(backend):
    tries = [call_overhead.measure_all(backend, 400) for _ in range(2)]
    for op, limit in call_overhead.LIMITS[backend].items():
        found = min((each for found in tries for each in found if each.op == op), key=lambda each: each.ratio)
        assert found.ratio <= limit, found


@pytest.mark.rest
def test_a_regression_is_noticed():
    """Without plans, every call is far above its limit."""
    with without_plans():
        for op, limit in call_overhead.LIMITS["cpu"].items():
            assert measured(op, 100).ratio > limit


@pytest.mark.rest
def test_the_cuts_of_a_step_add_up():
    found = call_overhead.cuts("modal_pool", 20)
    parts = (found.function_us, found.node_us, found.backward_us, found.forward_kernel_us, found.backward_kernel_us)
    assert sum(parts) == pytest.approx(found.step_us)
    assert 0 < found.empty_us < found.step_us


def test_the_cuts_are_shown_and_written(tmp_path, capsys):
    file = tmp_path / "cuts.json"
    assert call_overhead.main(["--cuts", "--rounds", "3", "--threads", "2", "--json", str(file)]) == 0
    assert [each["op"] for each in json.loads(file.read_text())] == list(call_overhead.LIMITS["cpu"])
    assert capsys.readouterr().out.count("\n") == len(call_overhead.LIMITS["cpu"]) + 1


def test_every_backend_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    file = tmp_path / "overhead.json"
    call_overhead.main(["--rounds", "3", "--json", str(file)])
    found = json.loads(file.read_text())
    assert {(each["op"], each["backend"]) for each in found} == {
        (op, backend) for backend, limits in call_overhead.LIMITS.items() for op in limits
    }
    assert all(each["overhead_us"] > 0 and each["empty_us"] > 0 for each in found)
    assert capsys.readouterr().out.count("\n") == len(found) + 1
