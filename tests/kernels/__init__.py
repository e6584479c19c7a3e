"""Kernels, in Triton's interpreter or on the GPU where there is one."""
