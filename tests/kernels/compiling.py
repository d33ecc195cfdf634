"""Compiles what a launch launches, for GPUs this machine does not have, and reads the machine code.

A launch is any function without arguments that calls the package's own launch functions on tensors of device
"meta". Nothing is described twice: the kernel, its signature, its configuration for the architecture and
Triton's own specialisation on alignment are those of production, since Triton is run as usual with a driver
that claims to be the wanted GPU and with every kernel call turned into "compile only".

    LAUNCHES = {"translate": lambda: translate(meta(8192, 4096), meta(4096, 4096))}
    reports = compile_launches(__file__, [("translate", 80), ("translate", 90)])
    reports["translate", 90][0].registers

The work is done in processes of their own (this file, run as a script): without Triton's interpreter, and
with another Triton where its folder is given. Triton's cache makes a second run quick.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

#: Shared memory a block may have, in bytes, and streaming multiprocessors.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
PROCESSORS = {80: 108, 90: 132, 100: 148}
#: Mnemonics of matrix instructions: mma of sm_80, wgmma of sm_90, tcgen05 of sm_100.
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
CACHE = Path(tempfile.gettempdir()) / f"tuned-lens-fast-compiled-{os.getuid()}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What the machine code of one launched kernel needs, and the code itself."""

    kernel: str
    registers: int  #: of a thread
    spills: int  #: STL and LDL instructions
    shared: int  #: bytes of a block
    warps: int
    stages: int
    matrix: dict[str, int]  #: matrix instructions by mnemonic
    serialised: bool  #: wgmma instructions that wait for one another (ptxas C7510 to C7514)
    constants: dict[str, object]  #: the kernel's constexpr arguments that JSON can hold
    sass: str = dataclasses.field(repr=False)


def meta(*shape: int, dtype: str = "bfloat16"):
    """A tensor without memory, to launch with."""
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def compile_launches(
    file: str, jobs: Sequence[tuple[str, int]], triton_path: str | None = None
) -> dict[tuple[str, int], list[Report] | str]:
    """Compile launches of the Python file ``file``, as many at a time as there are processors.

    Args:
        jobs: pairs of a name in the file's ``LAUNCHES`` and an architecture, such as 90 for sm_90.
        triton_path: a folder with another Triton (``pip install --no-deps --target FOLDER triton==3.6.0``).

    Returns:
        For each job a report for each kernel launched, in order; or the traceback of what failed.
    """
    environment = os.environ | {"TRITON_CACHE_DIR": str(CACHE)}
    environment.pop("TRITON_INTERPRET", None)
    if triton_path:
        paths = [triton_path, environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    def work(share: list[tuple[str, int]]):
        with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
            command = [sys.executable, __file__, file, json.dumps(share), answer.name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the compiling process ended with {done.returncode}:\n{done.stderr[-4000:]}")
            return json.load(answer)

    count = min(os.cpu_count() or 1, len(jobs))
    with ThreadPoolExecutor(count) as pool:
        answers = pool.map(work, [jobs[i::count] for i in range(count)])
    return {
        (name, architecture): answer if isinstance(answer, str) else [Report(**report) for report in answer]
        for share in answers
        for (name, architecture, answer) in share
    }


class _Driver:
    """Stands in for Triton's CUDA driver: enough of it to compile, nothing to run."""

    architecture = 0

    def get_current_device(self):
        return self.architecture  # Triton keeps compiled kernels by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


def _read(kernel) -> dict:
    """A compiled kernel -> the fields of a Report."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([tools / tool, option, cubin.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.MULTILINE))
    constants = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    return {
        "kernel": kernel.metadata.name,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": opcodes["STL"] + opcodes["LDL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "matrix": {name: opcodes[name] for name in MATRIX if opcodes[name]},
        # Where ptxas serialises, every wgmma is a group of its own (gsb0); else only the last of a step.
        "serialised": 2 * len(re.findall(r"HGMMA.*\bgsb0", sass)) > opcodes["HGMMA"],
        "constants": {name: value for name, value in constants.items() if isinstance(value, (int, float, str))},
        "sass": sass,
    }


def _main(file: str, jobs: str, output: str) -> None:
    import torch
    import triton
    from triton.runtime import JITFunction

    driver = _Driver()
    triton.runtime.driver.set_active(driver)
    torch.cuda.get_device_capability = lambda device=None: divmod(driver.architecture, 10)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        multi_processor_count=PROCESSORS[driver.architecture]
    )
    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    spec = importlib.util.spec_from_file_location("launches", file)
    module = sys.modules["launches"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answers = []
    for name, driver.architecture in json.loads(jobs):
        compiled.clear()
        try:
            module.LAUNCHES[name]()
            answer = [_read(kernel) for kernel in compiled]
        except Exception:
            answer = traceback.format_exc()
        answers.append((name, driver.architecture, answer))
    Path(output).write_text(json.dumps(answers))


if __name__ == "__main__":
    _main(*sys.argv[1:])
