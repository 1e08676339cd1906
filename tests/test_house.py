"""The house: no circles of imports, lazy imports are façades, files and functions fit on a screen."""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FILE, LONGEST_FUNCTION = 300, 45


def modules() -> dict[str, Path]:
    """The product's source files by their module names."""
    found = {}
    for folder, prefix in (("fxzip", ""), ("passes", "fxzip.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if relative.parts[:2] != ("fxzip", "passes"):  # the link of the development install
                name = prefix + ".".join(relative.with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(node: ast.AST) -> Iterator[str]:
    """The product's modules that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in MODULES)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            if inner in MODULES:
                yield inner
            elif node.module in MODULES:
                yield node.module


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def eager(name: str) -> set[str]:
    """What a module imports when it is imported."""
    found: set[str] = set()
    for node in TREES[name].body:
        if not is_for_types(node):
            found.update(target for inner in ast.walk(node) for target in imported(inner) if not _lazy(node, inner))
    return found - {name}


def _lazy(top: ast.AST, inner: ast.AST) -> bool:
    return any(inner in ast.walk(f) for f in ast.walk(top) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_no_circle_of_imports() -> None:
    graph = nx.DiGraph([(name, target) for name in MODULES for target in eager(name)])
    assert list(nx.simple_cycles(graph)) == []


def test_values_do_not_import_passes() -> None:
    """The ground, the rules and the values that flow are below the passes."""
    below = ("fxzip.rules", "fxzip.labelling", "fxzip.matching", "fxzip.data")
    grounds = ("fxzip.channels", "fxzip.graphs", "fxzip.errors", "fxzip.moments", "fxzip.contraction", "fxzip.report")
    wrong = {
        name: sorted(t for t in eager(name) if t.startswith("fxzip.passes"))
        for name in MODULES
        if name.startswith(below) or name in grounds
    }
    assert {name: targets for name, targets in wrong.items() if targets} == {}


def test_names_of_modules_in_passes_are_public() -> None:
    assert [name for name in MODULES if name.startswith("fxzip.passes.") and "._" in name] == []


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_fit(name: str) -> None:
    text = MODULES[name].read_text()
    assert text.count("\n") <= LONGEST_FILE
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    code = {line for t in tokens if t.type not in skipped for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = node.body[0] if ast.get_docstring(node) else None
            words = range(doc.lineno, (doc.end_lineno or doc.lineno) + 1) if doc else range(0)
            # Signatures are declarations: those of commands are long.
            lines = [n for n in range(node.body[0].lineno, (node.end_lineno or 0) + 1) if n in code and n not in words]
            assert len(lines) <= LONGEST_FUNCTION, node.name


def test_the_passes_show_themselves_as_a_table() -> None:
    command = [sys.executable, "-c", "import fxzip.passes; print(fxzip.passes.__doc__)"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = [line.split("|")[1].strip(" `") for line in shown.splitlines() if line.startswith("| `")]
    names = {p.stem for p in (ROOT / "passes").iterdir() if p.stem not in ("__init__", "__pycache__")}
    assert set(rows) == names
