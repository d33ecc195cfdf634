"""Everything in this folder runs on an NVIDIA GPU: ``pytest -m gpu tests/gpu``.

Where there is none, the tests are skipped. They are collected all the same, and importing them imports
Triton; so the interpreter, which must be chosen before that, is chosen here for the tests in tests/kernels.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
GPU = torch.cuda.is_available() and torch.version.cuda is not None

if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
elif os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("TRITON_INTERPRET=1 is set: unset it, or nothing here would run on the GPU")

sys.path.insert(0, str(HERE.parent / "kernels"))  # for cases.py


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not GPU:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; PyTorch sees none here"))


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _give_memory_back():
    yield
    if GPU:
        torch.cuda.empty_cache()


@pytest.fixture
def needs_memory(device):
    """Call with the GiB a test allocates: skips it on a smaller GPU."""

    def needs(gib: float) -> None:
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        if free < gib:
            pytest.skip(f"allocates {gib:.0f} GiB of GPU memory; {free:.0f} GiB are free")

    return needs
