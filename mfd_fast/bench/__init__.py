"""The benchmark harness: workloads, implementations, correctness gate, ceilings, timing, verdict.

It lives in the package, and not in ``benchmarks/``, because ``mfd-fast bench`` must measure a user's own shapes from an
installed wheel, where ``benchmarks/`` (suites, plots, the published report, the pytest entry) does not exist.

Importing ``mfd_fast`` imports nothing from here.
"""
