"""Tensor functions: every operation has a reference, a chunked form and, on a GPU, a kernel."""
