"""Benchmarks of softkv against what it replaces; figures in the README come from `benchmarks/results`."""
