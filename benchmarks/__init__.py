"""Measured comparisons: ``pytest benchmarks --benchmark-only`` or ``python -m benchmarks``."""
