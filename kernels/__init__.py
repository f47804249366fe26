"""Triton kernels of softkv."""
