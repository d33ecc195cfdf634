"""A result's file: what was measured, by which command, on which machine and with what installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from tuned_lens_fast.atomic_write import atomic_write

#: What decides how fast a CPU multiplies.
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "sve", "i8mm")
PEERS = ("tuned-lens", "cut-cross-entropy", "liger-kernel")
PACKAGES = ("tuned-lens-fast", "torch", "triton", "numpy", "transformers", *PEERS)


def heading(script: str, arguments: list[str], device: str) -> dict[str, Any]:
    """What every result begins with."""
    return {"command": command(script, arguments), "device": device, "environment": environment(device)}


def command(script: str, arguments: list[str]) -> str:
    """The command as a reader would type it again, with the engine's own settings, without where its result went."""
    settings = [f"{name}={value}" for name, value in os.environ.items() if name == "TUNED_LENS_FAST_CPU"]
    kept = [word for before, word in zip(["", *arguments], arguments, strict=False) if "--out" not in (before, word)]
    return shlex.join([*settings, "python", f"bench/{script}", *kept])


def environment(device: str) -> dict[str, Any]:
    """Machine, versions, commit and date."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": gpu.name,
            "processors": gpu.multi_processor_count,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "l2_mib": round(gpu.L2_cache_size / 2**20),
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit checked out, with a + where files differ from it; None outside of a repository."""
    folder = Path(__file__).parent
    try:
        said = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] + ("+" if said[1] else "")


def _cpu() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "name": fields.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def _driver() -> str | None:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def write(path: Path, result: dict[str, Any]) -> None:
    """As JSON, seven digits of every number, on lines as long as a screen is wide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as aside:
        aside.write_text(_lines(_rounded(result)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _lines(value: Any, before: str = "") -> str:
    """Whatever fits is on a line of its own; ``before``: the spaces in front of it."""
    line = json.dumps(value)
    if not value or not isinstance(value, (dict, list)) or len(before) + len(line) <= 160:
        return line
    inner = before + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(name)}: {_lines(one, inner)}" for name, one in value.items()]
    else:
        parts = [_lines(one, inner) for one in value]
    first, last = line[0], line[-1]
    return f"{first}\n" + ",\n".join(inner + part for part in parts) + f"\n{before}{last}"
