"""Short rows of the common case have a road of their own: it gives what the general one gives, bit by bit."""

import math

import pytest
import torch

import mfd_fast as mfd
from mfd_fast.testing import assert_bitwise_equal


def loss_and_gradient(s, t, **options):
    leaf = s.clone().requires_grad_()
    loss = mfd.distill_loss(leaf, t, backend="cpu", **options)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("classes", [1, 2, 5, 16, 31, 100, 128, 1000, 1024])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 2.5, 0.25])
@pytest.mark.parametrize("labelled", [False, True])
def test_short_rows_are_the_general_rows(classes, temperature, labelled):
    """A temperature per row leads to the general road."""
    generator = torch.Generator().manual_seed(classes)
    s, t = 4 * torch.randn(2, 37, classes, generator=generator)
    options = {"mask": torch.rand(37, generator=generator) < 0.8}
    if labelled:
        options |= {"labels": torch.randint(classes, (37,), generator=generator), "hard_weight": 0.5}
    if classes > 2:  # a student of -inf where the teacher is not, both, a NaN in a row that does not count
        s[3, 1] = s[5, 0] = t[5, 0] = -math.inf
        options["mask"][7], s[7, 1] = False, math.nan
    for weight in (None, torch.rand(37, generator=generator)):
        found = loss_and_gradient(s, t, temperature=temperature, weight=weight, **options)
        general = loss_and_gradient(s, t, temperature=torch.full((37,), temperature), weight=weight, **options)
        for a, b in zip(found, general, strict=True):
            assert_bitwise_equal(a, b)
