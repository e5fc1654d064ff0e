"""Plain PyTorch on any device and dtype."""

from __future__ import annotations


def available() -> str | None:
    """Always None: PyTorch itself is the only requirement."""
    return None
