"""Builds csrc/ where it can, and finds the packages: kernels/ is tuned_lens_fast.kernels by a link.

Everything else is in pyproject.toml. The native engine needs a C++ compiler and, in the environment it is built in, a
PyTorch of 2.10 or newer: the first whose stable ABI has all that csrc/ uses, so that one build serves every later
version as well. Where either is missing, the package is installed without it and ``engines()`` says so. Its kernels
for GPUs are a library of their own, built where nvcc and a CUDA build of PyTorch are found.

``TUNED_LENS_FAST_NATIVE=1`` makes a build that fails an error, ``=sanitize`` as well, with the sanitizers that
``make sanitize`` wants; ``=0`` forbids it.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

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
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        return skip(f"PyTorch is not in the environment of the build ({error}); pip install --no-build-isolation")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return skip(f"PyTorch {torch.__version__} is older than 2.10")

    class Build(BuildExtension):
        def build_extensions(self):
            wanted, self.extensions = self.extensions, []
            for extension in wanted:
                built, self.extensions = self.extensions, [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:  # whatever a compiler, or the lack of one, leads to
                    if FORCED:
                        raise
                    skip(f"{extension.name}: {error}")
                self.extensions = built

        def copy_extensions_to_source(self):  # of an editable install
            built = [e for e in self.extensions if Path(self.build_lib, self.get_ext_filename(e.name)).exists()]
            self.extensions = built
            super().copy_extensions_to_source()

    # No -march: csrc/ holds the code of every instruction set and chooses as it runs.
    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fvisibility=hidden"]
    linked = []
    if WANTED == "sanitize":
        linked = ["-fsanitize=address,undefined"]
        flags += [*linked, "-fno-sanitize-recover=undefined", "-g", "-O1"]
    common = {
        "depends": [str(path) for path in Path("csrc").iterdir()],
        "define_macros": [("TORCH_TARGET_VERSION", "0x020a000000000000")],
        "extra_link_args": linked,
        "py_limited_api": True,
    }
    sources = ["csrc/tile.cpp", "csrc/walk.cpp"]
    extensions = [CppExtension("tuned_lens_fast._native", sources, extra_compile_args=flags, **common)]
    if torch.version.cuda is not None and CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc").exists():
        if not torch.cuda.is_available():  # else PyTorch builds for the GPUs it sees
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "7.5;8.0;9.0+PTX")
        compiling = {"cxx": flags, "nvcc": ["-O3", "-std=c++20"]}
        extensions.append(
            CUDAExtension("tuned_lens_fast._native_cuda", ["csrc/tile.cu"], extra_compile_args=compiling, **common)
        )
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def skip(reason):
    if FORCED:
        sys.exit(f"native engine: {reason}")
    print(f"native engine: not built: {reason}", file=sys.stderr)
    return {}


packages = find_packages(include=["tuned_lens_fast", "tuned_lens_fast.*"])
if "tuned_lens_fast.kernels" not in packages:  # a checkout without symbolic links has a small file in the link's place
    packages.append("tuned_lens_fast.kernels")

setup(
    packages=packages,
    package_dir={} if Path("tuned_lens_fast/kernels").is_dir() else {"tuned_lens_fast.kernels": "kernels"},
    package_data={"tuned_lens_fast": ["py.typed"], "tuned_lens_fast.plotting": ["page/*"]},
    **native(),
)
