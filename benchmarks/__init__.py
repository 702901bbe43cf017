"""Claims and the scripts that measure them: ``python -m benchmarks.NAME``; results in ``benchmarks/results``."""
