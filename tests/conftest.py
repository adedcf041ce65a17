"""Where the tests run: on a GPU with CK_TEST_DEVICE=cuda; else on the CPU, Triton interpreted."""

import os
from importlib import import_module

import interpreted
import pytest
from hypothesis import HealthCheck, settings

DEVICE = os.environ.get("CK_TEST_DEVICE", "cpu")
# What these folders and files test does not depend on the device.
CPU_ONLY = {
    "distributed", "package", "site", "test_bench_base", "test_bench_cases", "test_bench_installed",
    "test_bench_options", "test_bench_output", "test_bench_run", "test_callbacks", "test_fold",
    "test_gpu_plan", "test_infomin", "test_launches", "test_whiten_block",
}  # fmt: skip
# Files that a worker is busy with for long: started first, none is left alone with one at the end.
SLOWEST = (
    "test_triton_compile",
    "test_distributed",
    "test_oldest",
    "test_losses",
    "test_ops",
    "test_triton",
)
# Each of their tests starts processes or compiles with torch for long: on a GPU they come last.
LAST_ON_A_GPU = ("test_compile", "test_memory", "test_distributed_switches", "test_trainings")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when contrastive_kernels is imported

# `--hypothesis-profile=fuzz` is what `make fuzz` runs
settings.register_profile(
    "default", max_examples=32, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.register_profile(
    "fuzz", settings.get_profile("default"), max_examples=3000, derandomize=False, print_blob=True
)
settings.load_profile("default")


def pytest_configure(config):
    """Imports torch, which takes seconds, but where tests are only handed to workers."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch
    import torch._functorch.config as functorch_config

    # results of an operator that share memory: torch raises where CI is set, elsewhere it warns
    functorch_config.error_on_custom_op_aliasing = True
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)
    if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # they share the cores, with one thread each
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def device(request):
    """On a GPU, makes tensors on the CPU where the test does not depend on the device."""
    if DEVICE != "cpu" and CPU_ONLY & {request.path.parent.name, request.path.stem}:
        with import_module("torch").device("cpu"):
            yield
    else:
        yield


@pytest.fixture(autouse=True, scope="session")
def kernels():
    """Interpreted fast; on a GPU few pairs go the way of many, as they do interpreted."""
    if DEVICE == "cpu":
        interpreted.prepare_once()
    else:
        import_module("contrastive_kernels.triton.engine").FIXED_PAIRS = 0
        import_module("contrastive_kernels.backends").FEW_PRODUCTS = 0


def pytest_collection_modifyitems(config, items):
    """Puts the slowest files first; on a GPU, where time may run out, last."""
    places = order(DEVICE)
    items.sort(key=lambda item: places.get(item.path.stem, 0))


def order(device):
    """Places of files; of all others 0."""
    if device != "cpu":
        return dict.fromkeys(LAST_ON_A_GPU, 1)
    return {name: place - len(SLOWEST) for place, name in enumerate(SLOWEST)}
