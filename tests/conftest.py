"""Where the tests run: on a GPU with CK_TEST_DEVICE=cuda; else on the CPU, Triton interpreted."""

import os

import pytest
import torch

DEVICE = os.environ.get("CK_TEST_DEVICE", "cpu")
# What these test does not depend on the device.
CPU_ONLY = (
    "test_build", "test_demo", "test_distributed", "test_examples", "test_fold", "test_imports",
    "test_infomin", "test_readme", "test_whiten_block",
)  # fmt: skip
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when contrastive_kernels is imported
else:
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def device(request):
    """On a GPU, makes tensors on the CPU where the test does not depend on the device."""
    if DEVICE != "cpu" and request.module.__name__.rpartition(".")[2] in CPU_ONLY:
        with torch.device("cpu"):
            yield
    else:
        yield


def pytest_collection_modifyitems(config, items):
    """Leaves out the whitening losses on the Triton backend, which has no kernels for them."""

    def there_is_one(item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        names = (item.name, str(parameters.get("name")))
        whitens = any(name.startswith(("test_w_mse", "w_mse", "intl")) for name in names)
        return not (whitens and parameters.get("backend") == "triton")

    items[:] = [item for item in items if there_is_one(item)]
