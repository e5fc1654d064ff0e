"""Triton device code: ``@triton.jit`` functions and the tuples they hand on; no torch.

Host code is in ``mfd_fast.backends.triton``.
"""
