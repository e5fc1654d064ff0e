"""Triton device code: ``@triton.jit`` functions and nothing else. Host code is in ``mfd_fast.backends.triton``."""
