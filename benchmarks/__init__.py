"""Measurements behind the figures of the README. See `benchmarks/README.md`; run with `python -m benchmarks`."""
