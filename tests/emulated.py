"""Code of csrc/ for processors that need not be here, run on the CPU that is: see tests/emulation/."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent


def _gcc() -> str | None:
    """GCC, whose vectors csrc/ uses; None where there is none (on some systems g++ is Clang)."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        return None
    macros = subprocess.run([found, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    return found if "__GNUC__" in macros and "__clang__" not in macros else None


COMPILER = _gcc()


@functools.cache
def _library(source: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"{source}.so"
        flags = ["-O2", "-std=c++20", "-shared", "-fPIC", "-pthread", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
        if os.uname().machine == "x86_64":
            flags.append("-mfma")  # or every product of the emulated unit is a call
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        command = [COMPILER, *flags, "-I", ROOT / "csrc", ROOT / f"tests/emulation/{source}.cpp", "-o", out]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(out))


def _call(source: str, name: str, *arguments: Tensor | int | None) -> None:
    """Call a C function with tensors' memory and numbers."""
    values = [
        ctypes.c_void_p(value.data_ptr() if isinstance(value, Tensor) else value)
        if value is None or isinstance(value, Tensor)
        else ctypes.c_int64(value)
        for value in arguments
    ]
    getattr(_library(source), name)(*values)


def amx_matmul(x: Tensor, weight: Tensor, most: int, z: Tensor) -> None:
    """The operator of that name, on AMX's instructions in software."""
    assert x.is_contiguous()
    assert all(rows.stride(1) == 1 or rows.shape[1] < 2 for rows in (weight, z))
    split = weight.dtype == torch.float32
    assert split or x.shape[0] == 1
    of_x = (x.stride(0), x.stride(1), x.shape[0], most, z.shape[0])
    _call("amx", "amx_matmul", x, *of_x, weight, *weight.shape, weight.stride(0), split, z, z.stride(0))


def tile_pass(z, first, targets, threshold, sums, r, target, top, rescale) -> None:
    """The operator of that name, by its CUDA kernel on threads of the CPU."""
    shape = (z.shape[0], z.stride(0), z.shape[1], first)
    k = 0 if top is None else top.shape[1]
    _call("cuda", "tile_pass", z, *shape, targets, threshold, sums, r, target, top, k, rescale)


def tile_divergences(z_p, z_q, normaliser_p, normaliser_q, with_js, sums) -> None:
    """The operator of that name, by its CUDA kernel on threads of the CPU."""
    shape = (z_p.stride(0), z_q.stride(0), z_q.shape[1], z_p.shape[0], z_q.shape[0])
    _call("cuda", "tile_divergences", z_p, z_q, *shape, normaliser_p, normaliser_q, sums)
