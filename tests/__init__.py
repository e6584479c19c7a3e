"""Triton decides when a kernel is defined whether it is interpreted: before any test imports one."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
