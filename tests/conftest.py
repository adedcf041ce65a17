"""Where the tests run: on a GPU with CK_TEST_DEVICE=cuda; else on the CPU, Triton interpreted."""

import os

import torch

DEVICE = os.environ.get("CK_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when contrastive_kernels is imported
else:
    torch.set_default_device(DEVICE)
