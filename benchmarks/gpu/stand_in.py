"""The package as on a GPU, on a machine without one: its operators take CPU tensors, and Triton
binds and compiles its kernels instead of interpreting them.

For a process of its own, which imports this first of all.
"""

import os
import sys

if {"contrastive_kernels", "triton"} & set(sys.modules):
    raise ImportError("benchmarks.gpu.stand_in must be imported before the package and triton")
# the package reads this when it is imported, and Triton when the first kernel runs
os.environ["TRITON_INTERPRET"] = "1"
import contrastive_kernels  # noqa: E402, F401

os.environ["TRITON_INTERPRET"] = "0"
backends = sys.modules["contrastive_kernels.backends"]
backends.FEW_PRODUCTS = backends.LAUNCH_BOUND
