"""What is installed: every package of the tree, the mark that it is typed, the command."""

import ast
import graphlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "tuned_lens_fast", "kernels", "csrc")


def copy_sources(tree, links=True):
    """As a checkout has them; one that makes no symbolic links has a small file in the place of each."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    if not links:
        link = tree / "tuned_lens_fast/kernels"
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)


def build(tree, out, links=True, **environment):
    """A wheel built from a copy of the sources, without a network."""
    copy_sources(tree, links)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    return subprocess.run(
        [*command, "--wheel-dir", out, tree], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    done = build(tree, out)
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.slow
def test_every_module_is_installed(wheel):
    names = set(wheel.namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "tuned_lens_fast").rglob("*.py")}
    kernels = {
        f"tuned_lens_fast/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")
    }
    assert "tuned_lens_fast/kernels/__init__.py" in kernels
    assert package | kernels <= names
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "tuned_lens_fast/plotting/page").iterdir()}
    assert len(pages) == 5
    assert pages | {"tuned_lens_fast/py.typed"} <= names


@pytest.mark.slow
def test_a_checkout_without_links_installs_the_kernels_too(tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "wheel"
    tree.mkdir()
    done = build(tree, out, links=False, TUNED_LENS_FAST_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        test_every_module_is_installed(archive)


@pytest.mark.slow
def test_the_root_of_a_checkout_without_links_can_be_imported_from(tmp_path):
    copy_sources(tmp_path, links=False)
    script = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
        "import tuned_lens_fast as tl; print(tl.engines())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "'eager': 'ok'" in done.stdout
    assert "its kernels are not beside it" in done.stdout


@pytest.mark.slow
def test_nothing_else_is(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tuned_lens_fast"}


@pytest.mark.slow
def test_the_command(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "tuned-lens-fast = tuned_lens_fast.cli:main" in wheel.read(name).decode()


def engines_of(wheel, folder):
    """What ``engines()`` says where only the wheel's content is installed."""
    wheel.extractall(folder)
    # Without the finder of an editable install, which would lend its own native library.
    script = (
        "import json, sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
        "import tuned_lens_fast as tl; print(tl.__file__); print(json.dumps(tl.engines()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        check=True,
    )
    file, found = done.stdout.splitlines()
    assert Path(file).is_relative_to(folder)
    return json.loads(found)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_a_wheel_holds_the_native_engine(wheel, tmp_path):
    assert "-abi3-" in Path(wheel.filename).name
    assert engines_of(wheel, tmp_path)["native"].startswith("ok")


@pytest.mark.slow
def test_without_a_compiler_the_package_installs_and_says_what_is_missing(tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "wheel"
    tree.mkdir()
    done = build(tree, out, CXX="/nonexistent", TUNED_LENS_FAST_NATIVE="")
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        said = engines_of(archive, tmp_path / "site")
    assert said["eager"] == "ok"
    assert "TUNED_LENS_FAST_NATIVE=1" in said["native"]


@pytest.mark.slow
def test_a_build_can_be_forced(tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "wheel"
    tree.mkdir()
    assert build(tree, out, CXX="/nonexistent", TUNED_LENS_FAST_NATIVE="1").returncode != 0
    assert not [*out.glob("*.whl")]


@pytest.mark.slow
def test_the_sources_are_in_a_source_distribution(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    copy_sources(tree)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tree, env=os.environ | {"TUNED_LENS_FAST_NATIVE": "0"}, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir()} <= names


def test_modules_import_each_other_in_one_direction():
    """No circle, imports for type checkers and those within functions included."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in [*(ROOT / "tuned_lens_fast").rglob("*.py"), *(ROOT / "tuned_lens_fast/kernels").glob("*.py")]
    }
    imports = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                imports[name] |= inner & modules.keys() or {node.module}
            elif isinstance(node, ast.Import):
                imports[name] |= {alias.name for alias in node.names} & modules.keys()
        imports[name].discard(name)
    assert len(modules) > 50
    graphlib.TopologicalSorter(imports).prepare()  # raises a CycleError


def test_nothing_heavy_is_imported_before_it_is_needed():
    """The command line starts without PyTorch, and lenses are there without what only some of their users need."""
    script = """if True:
        import sys, contextlib, io
        from tuned_lens_fast.cli import main
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            main(["--help"])
        assert "decode" in said.getvalue()
        print("torch" in sys.modules, "numpy" in sys.modules)
        import tuned_lens_fast as tl
        assert callable(tl.engines) and tl.decode_model and tl.LogitLens and tl.plotting.PredictionTrajectory
        assert callable(tl.engines) and set(tl.__all__) <= set(dir(tl))
        heavy = {"torch._dynamo", "transformers", "plotly", "pandas", "pyarrow", "datasets", "huggingface_hub"}
        print(*heavy & sys.modules.keys())
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False False\n\n"
