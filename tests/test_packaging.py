"""What is installed: every package of the tree, the mark that it is typed, the command."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "tuned_lens_fast", "kernels", "csrc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree without a network."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    done = subprocess.run([*command, "--wheel-dir", out, tree], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_every_module_is_installed(wheel):
    names = set(wheel.namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "tuned_lens_fast").rglob("*.py")}
    kernels = {
        f"tuned_lens_fast/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")
    }
    assert "tuned_lens_fast/kernels/__init__.py" in kernels
    assert package | kernels <= names
    assert "tuned_lens_fast/py.typed" in names


def test_nothing_else_is(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tuned_lens_fast"}


def test_the_command(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "tuned-lens-fast = tuned_lens_fast.cli:main" in wheel.read(name).decode()
