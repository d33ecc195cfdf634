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
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-pthread", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
        flags += ["-D_GLIBCXX_ASSERTIONS"]
        if os.uname().machine == "x86_64":
            flags += ["-mavx2", "-mfma"]  # or every product of an emulated unit is a call
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        command = [COMPILER, *flags, "-I", ROOT / "csrc", ROOT / f"tests/emulation/{source}.cpp", "-o", out]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(out))


def _call(source: str, name: str, *arguments: Tensor | float | None) -> None:
    """Call a C function with tensors' memory and numbers."""
    values = [
        ctypes.c_float(value)
        if isinstance(value, float)
        else ctypes.c_void_p(value.data_ptr() if isinstance(value, Tensor) else value)
        if value is None or isinstance(value, Tensor)
        else ctypes.c_int64(value)
        for value in arguments
    ]
    getattr(_library(source), name)(*values)


class Unit:
    """The operators on products, on a unit that this processor need not have: a name of TUNED_LENS_FAST_CPU."""

    def __init__(self, name: str) -> None:
        self.number = ("avx512", "avx512_bf16", "amx").index(name)

    def _walk(self, x, weight, bias, scale, softcap, parts, most, *outs) -> None:
        assert all(rows.stride(1) == 1 or rows.shape[1] < 2 for rows in (x, weight))
        assert x.dtype == torch.float32
        assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
        kind = (torch.float32, torch.bfloat16, torch.float16).index(weight.dtype)
        # As csrc/walk.cpp has it: AMX where numbers have parts, pairs for what is bf16.
        unit = (0 if not parts else 2) if self.number == 2 else min(self.number, kind % 2)
        split = (parts, most) if unit == 2 else (1, 0)
        of_x, of_w = (x, *x.shape, x.stride(0)), (weight, kind, weight.shape[0], weight.stride(0))
        _call("walk", "walk", unit, *of_x, *of_w, bias, float(scale), float(softcap), *split, *outs)

    def logits(self, x, weight, bias, scale, softcap, parts, most, z) -> None:
        """The operator of that name."""
        assert z.stride(1) == 1 or z.shape[1] < 2
        self._walk(x, weight, bias, scale, softcap, parts, most, z, z.stride(0), *[None] * 6, 0, None)

    def vocabulary_walk(
        self, x, weight, bias, scale, softcap, parts, most, targets, threshold, sums, r, target, top, u
    ) -> None:
        """The operator of that name."""
        k = 0 if top is None else top.shape[1]
        found = (targets, threshold, sums, r, target, top, k, u)
        self._walk(x, weight, bias, scale, softcap, parts, most, None, 0, *found)

    def install(self, monkeypatch, native) -> None:
        """Have the native engine take it."""
        name = ("avx512", "avx512_bf16", "amx")[self.number]
        monkeypatch.setattr(native, "product_unit", lambda: name)
        for operator in ("logits", "vocabulary_walk"):
            monkeypatch.setattr(torch.ops.tuned_lens_fast, operator, getattr(self, operator))


def tile_pass(z, first, targets, threshold, sums, r, target, top, rescale) -> None:
    """The operator of that name, by its CUDA kernel on threads of the CPU."""
    shape = (z.shape[0], z.stride(0), z.shape[1], first)
    k = 0 if top is None else top.shape[1]
    _call("cuda", "tile_pass", z, *shape, targets, threshold, sums, r, target, top, k, rescale)


def tile_divergences(z_p, z_q, normaliser_p, normaliser_q, with_js, sums) -> None:
    """The operator of that name, by its CUDA kernel on threads of the CPU."""
    shape = (z_p.stride(0), z_q.stride(0), z_q.shape[1], z_p.shape[0], z_q.shape[0])
    _call("cuda", "tile_divergences", z_p, z_q, *shape, normaliser_p, normaliser_q, sums)
