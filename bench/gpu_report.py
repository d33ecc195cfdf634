"""Puts what bench/gpu.sh found into one JSON file: python bench/gpu_report.py SCRATCH FOLDER."""

from __future__ import annotations

import csv
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any


def tests(path: Path) -> dict[str, Any]:
    """Counts, and the names of tests that failed."""
    if not path.exists():
        return {"ran": False}
    suite = next(iter(ET.parse(path).getroot().iter("testsuite")))
    broken = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {"ran": True, **counts, "seconds": float(suite.get("time", 0)), "broken": broken}


def profile(path: Path) -> dict[str, str]:
    """Metric -> value with its unit, of the one kernel that was profiled; empty where no profiler works."""
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    return {row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip() for row in csv.DictReader(lines)}


def main() -> None:
    scratch, folder = Path(sys.argv[1]), Path(sys.argv[2])
    measured = scratch / "measured.json"
    report: dict[str, Any] = json.loads(measured.read_text()) if measured.exists() else {}
    report["tests"] = tests(scratch / "tests.xml")
    report["profile"] = profile(scratch / "profile.csv")
    environment = report.get("environment", {})
    device = environment.get("device", "unknown-gpu").replace("NVIDIA ", "").split()[0].lower()
    out = folder / f"{device}-{environment.get('date', 'undated')}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\ntests: {report['tests']}\nprofile: {report['profile']}\nwritten: {out}")


if __name__ == "__main__":
    main()
