"""The house: what the wheel holds, what an import costs, what is public."""

import inspect
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import fxzip

ROOT = Path(__file__).parents[1]
HEAVY = ("timm", "torchvision", "matplotlib", "onnx", "sklearn")


def sources() -> set[str]:
    """Where each source file belongs in the wheel."""
    own = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fxzip").rglob("*.py")}
    passes = {f"fxzip/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "passes").rglob("*.py")}
    return own | passes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a clean copy: no link, no build/."""
    clean = tmp_path_factory.mktemp("clean")
    out = tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clean)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "passes", clean / "passes", ignore=ignored)
    shutil.copytree(ROOT / "fxzip", clean / "fxzip", ignore=shutil.ignore_patterns("__pycache__", "passes"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, clean],
        check=True,
    )
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_every_source_once_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert set(names) == sources() | {"fxzip/py.typed", "fxzip/views/page/page.html.jinja"}


def test_wheel_has_licence_and_command(wheel: zipfile.ZipFile) -> None:
    meta = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "LICENSE" in meta
    assert "License-Expression: MIT" in meta["METADATA"]
    assert "fxzip = fxzip.__main__:main" in meta["entry_points.txt"]


def test_wheel_imports_without_the_tree(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fxzip, fxzip.passes; "
        "print(fxzip.__file__, *fxzip.passes.__path__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, tmp_path], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(tmp_path / "fxzip/__init__.py"), str(tmp_path / "fxzip/passes")]


def test_import_loads_nothing_heavy() -> None:
    code = f"import fxzip, sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_public_names_exist_and_are_documented() -> None:
    assert len(set(fxzip.__all__)) == len(fxzip.__all__)
    documented = [
        value
        for name in fxzip.__all__
        if inspect.isclass(value := getattr(fxzip, name)) or inspect.isroutine(value) or inspect.ismodule(value)
    ]
    assert documented
    assert [value for value in documented if not (value.__doc__ or "").strip()] == []


def test_version() -> None:
    assert fxzip.__version__ == version("fxzip")
