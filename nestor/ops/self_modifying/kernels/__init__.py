"""Triton kernels of linear self-modifying memories; imported where Triton is installed."""
