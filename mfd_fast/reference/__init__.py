"""Every op in plain PyTorch, any device and dtype: the oracle, the fallback and the benchmark baseline.

Called through the public ops with ``backend="reference"``.
"""
