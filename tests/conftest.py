"""Where the tests run: on a GPU with CK_TEST_DEVICE=cuda; else on the CPU, Triton interpreted."""

import os

import pytest
import torch

DEVICE = os.environ.get("CK_TEST_DEVICE", "cpu")
# What these test does not depend on the device.
CPU_ONLY = (
    "test_bench_base", "test_bench_cases", "test_bench_installed", "test_bench_options",
    "test_bench_output", "test_bench_run", "test_build", "test_demo", "test_distributed",
    "test_examples", "test_fold", "test_imports", "test_infomin", "test_negatives_study",
    "test_readme", "test_whiten_block",
)  # fmt: skip
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when contrastive_kernels is imported
else:
    torch.set_default_device(DEVICE)
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # workers that share the cores, with one thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def device(request):
    """On a GPU, makes tensors on the CPU where the test does not depend on the device."""
    if DEVICE != "cpu" and request.module.__name__.rpartition(".")[2] in CPU_ONLY:
        with torch.device("cpu"):
            yield
    else:
        yield
