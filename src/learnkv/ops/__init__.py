"""Tensor operations: one signature each, with a reference in plain PyTorch and, where it pays, a kernel."""
