"""Row losses that no kernel computes, whatever its backend: the reference does."""

from __future__ import annotations

from ..problems.rows import RowProblem


def beyond_kernels(rows: RowProblem) -> str | None:
    """The reason, None where the kernels do."""
    if rows.divergence.near_a_limit:
        return f"{rows.divergence} is so close to a limit that a kernel would lose its digits"
    return None
