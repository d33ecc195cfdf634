"""Where there is no GPU, kernels run in Triton's interpreter; where there is one, the same tests run on it.

The interpreter is chosen when Triton is first imported, by an environment variable. Setting it for the whole
process does no harm without a GPU: nothing else can run a kernel there, and the compile tests use processes
of their own.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()

if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))  # for tests that import `compiling`


def pytest_collection_modifyitems(items):
    for item in items:
        if ON_GPU and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        elif not ON_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: the size is beyond the interpreter"))


@pytest.fixture(scope="session")
def device():
    """Where kernels run in this session: the GPU, or the CPU by way of the interpreter."""
    if ON_GPU:
        return torch.device("cuda")
    if isinstance(tl.sum, triton.runtime.JITFunction):
        pytest.fail(
            "Triton was imported before tests/kernels/conftest.py could ask for its interpreter; "
            "set TRITON_INTERPRET=1, or run tests/kernels by itself"
        )
    return torch.device("cpu")


def repair_interpreter():
    """numpy has no bfloat16, so the interpreter keeps raw bits: tl.dot multiplies them, and a cast truncates.

    Seen with Triton 3.6.0 and 3.9.0. The GPU multiplies exactly into fp32 and rounds to the nearest even; so
    do these.
    """
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data.astype(np.float64)
        return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def create_dot(self, a, b, acc, *_):
        # In float64, or a sum would depend on the shape of its tile: BLAS has an order for each, a GPU one.
        total = np.matmul(widened(a), widened(b)) + acc.data
        return interpreter.TensorHandle(total.astype(acc.data.dtype), acc.dtype.scalar)

    def convert_float(data, source, destination, rounding):
        if (source, destination) != (tl.float32, tl.bfloat16):
            return convert(data, source, destination, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float


if not ON_GPU:
    repair_interpreter()
