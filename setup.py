"""Builds csrc/ where it can, and maps the folder kernels/ to the package tuned_lens_fast.kernels.

Everything else is in pyproject.toml. The native engine needs a C++ compiler and, in the environment it is built in, a
PyTorch of 2.10 or newer: the first whose stable ABI has all that csrc/ uses, so that one build serves every later
version as well. Where either is missing, the package is installed without it and ``engines()`` says so.

``TUNED_LENS_FAST_NATIVE=1`` makes a build that fails an error, ``=sanitize`` as well, with the sanitizers that
``make sanitize`` wants; ``=0`` forbids it.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

WANTED = os.environ.get("TUNED_LENS_FAST_NATIVE", "")
if WANTED not in ("", "0", "1", "sanitize"):
    sys.exit(f"TUNED_LENS_FAST_NATIVE: got {WANTED!r}, wanted 1 or sanitize to force the native build, 0 to forbid it")
FORCED = WANTED in ("1", "sanitize")


def native():
    """The extension and the command that builds it, or nothing."""
    if WANTED == "0":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return skip(f"PyTorch is not in the environment of the build ({error}); pip install --no-build-isolation")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return skip(f"PyTorch {torch.__version__} is older than 2.10")

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:  # whatever a compiler, or the lack of one, leads to
                if FORCED:
                    raise
                skip(str(error))

        def copy_extensions_to_source(self):  # of an editable install
            if all(Path(self.build_lib, self.get_ext_filename(e.name)).exists() for e in self.extensions):
                super().copy_extensions_to_source()

    # No -march: csrc/ holds the code of every instruction set and chooses as it runs.
    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fvisibility=hidden"]
    linked = []
    if WANTED == "sanitize":
        linked = ["-fsanitize=address,undefined"]
        flags += [*linked, "-fno-sanitize-recover=undefined", "-g", "-O1"]
    extension = CppExtension(
        "tuned_lens_fast._native",
        ["csrc/tile.cpp"],
        depends=["csrc/row.h", "csrc/passes.inl"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=flags,
        extra_link_args=linked,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def skip(reason):
    if FORCED:
        sys.exit(f"native engine: {reason}")
    print(f"native engine: not built: {reason}", file=sys.stderr)
    return {}


setup(
    packages=[
        "tuned_lens_fast",
        "tuned_lens_fast.data",
        "tuned_lens_fast.engines",
        "tuned_lens_fast.kernels",
        "tuned_lens_fast.models",
        "tuned_lens_fast.nn",
        "tuned_lens_fast.plotting",
    ],
    package_dir={"tuned_lens_fast": "tuned_lens_fast", "tuned_lens_fast.kernels": "kernels"},
    package_data={"tuned_lens_fast": ["py.typed"]},
    **native(),
)
