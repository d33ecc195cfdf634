"""csrc/tile.cu compiled for GPUs that need not be here, held to limits."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parent.parent / "csrc"
#: Of a thread, so that seven blocks of 128 are on a multiprocessor at once.
MOST_REGISTERS = 72


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_the_kernels_compile_without_spills(architecture, tmp_path):
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{architecture}" not in known:
        pytest.skip(f"this nvcc is older than sm_{architecture}")
    command = ["nvcc", "-std=c++20", "-O3", "-c", CSRC / "tile.cu", "-o", tmp_path / "tile.o"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in include_paths())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Function properties for (\S+)\n(.*)\n(.*)", done.stderr)
    assert {name for kernel, *_ in kernels for name in ("add_tile", "compare_tiles") if name in kernel} == {
        "add_tile",
        "compare_tiles",
    }
    for kernel, memory, used in kernels:
        assert "0 bytes spill stores, 0 bytes spill loads" in memory, kernel
        assert int(re.search(r"Used (\d+) registers", used)[1]) <= MOST_REGISTERS, (kernel, used)
