"""Suites, growth, plots and the published report around :mod:`mfd_fast.bench` (which says why it lives there)."""
