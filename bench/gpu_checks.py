"""Puts what the GPU tests and the profiler said into one JSON file: python bench/gpu_checks.py SCRATCH OUT.

See bench/gpu.sh; bench/report.py renders it.
"""

from __future__ import annotations

import csv
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import torch
from record import heading, write


def tests(path: Path) -> dict[str, Any] | None:
    """Counts, and the names of tests that failed; None where none have run."""
    if not path.exists():
        return None
    suite = next(iter(ET.parse(path).getroot().iter("testsuite")))
    broken = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "seconds": float(suite.get("time", 0)), "broken": broken}


def profile(path: Path) -> dict[str, str]:
    """Metric -> value with its unit, of the one kernel that was profiled; sections of advice are left out."""
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row.get("Metric Name")]
    kernel = {"kernel": rows[0]["Kernel Name"]} if rows else {}
    return kernel | {row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip() for row in rows}


def main() -> None:
    scratch, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = {
        "tests": tests(scratch / "tests.xml"),
        "profiles": {path.stem: profile(path) for path in sorted(scratch.glob("*.csv"))},
    }
    began = heading("gpu.sh", [], "cuda" if torch.cuda.is_available() else "cpu")
    write(out, {"kind": "gpu checks", **began, "command": "bash bench/gpu.sh", **found})
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")


if __name__ == "__main__":
    main()
