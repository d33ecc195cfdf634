"""The public names of tuned-lens and which of them are here: ``python tests/public_names.py``.

``tuned_lens_names.txt`` holds those of its main branch and of 0.2.0, a name a line, as :func:`names_of` reads them from
the source: what modules define, what packages pass on, and what classes have. Type variables, loggers and what begins
with an underscore are no part of it, nor are ``scripts``, whose place the command line takes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path

NAMES = Path(__file__).parent / "tuned_lens_names.txt"
#: Those that an error names the successor of, by the module they were in.
GONE = {"__main__.Main", "__main__.Main.command", "__main__.Main.log_level", "__main__.Main.execute"}


def names_of(package: Path) -> set[str]:
    """Dotted names, the package's own left out."""
    found = set()
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        module = [part for part in parts if part != "__init__"]
        if module[:1] == ["scripts"]:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = _defined(node)
            if path.name == "__init__.py" and isinstance(node, ast.ImportFrom) and node.level:
                names = {alias.asname or alias.name for alias in node.names}
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                inside = {name for member in node.body for name in _defined(member)}
                names |= {f"{node.name}.{name}" for name in inside if not name.startswith("_")}
            found |= {".".join([*module, name]) for name in names if not name.startswith("_")}
    return {name for name in found if name.rpartition(".")[2] not in ("T", "logger")}


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def is_here(name: str, package: str = "tuned_lens_fast") -> bool:
    """Whether the package has that name at that place."""
    parts = name.split(".")
    for count in range(len(parts) - 1, -1, -1):
        try:
            found = importlib.import_module(".".join([package, *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for i, part in enumerate(parts[count:]):
            kind = found
            try:
                found = getattr(found, part)
            except AttributeError:
                # Fields without a default are annotations only.
                annotated = {key for base in getattr(kind, "__mro__", ()) for key in inspect.get_annotations(base)}
                return i == len(parts[count:]) - 1 and part in annotated
        return True
    return False


def main() -> None:
    if len(sys.argv) > 1:  # folders of tuned-lens's source: write the list anew
        NAMES.write_text("\n".join(sorted(set().union(*(names_of(Path(folder)) for folder in sys.argv[1:])))) + "\n")
    names = NAMES.read_text().split()
    missing = [name for name in names if not is_here(name)]
    print(f"{len(names) - len(missing)} of {len(names)} public names of tuned-lens are here at their places")
    for name in missing:
        print(f"  not: {name}{' (an error says what to use)' if name in GONE else ''}")


if __name__ == "__main__":
    main()
