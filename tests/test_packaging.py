"""What users install: from the folder above a clone, and as a wheel made from the source distribution."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKED = ("softkv", "kernels", "benchmarks", "src", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_folder_above_a_clone_imports_the_package(tmp_path: Path) -> None:
    """Python looks into the working folder first, and there a clone called `softkv` is not the package."""
    (tmp_path / "softkv").symlink_to(ROOT)
    code = "import softkv, softkv.kernels, softkv.benchmarks; print(softkv.prefix_attention.__name__)"
    assert python("-c", code, cwd=tmp_path).strip() == "prefix_attention"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the source distribution of this clone, unpacked as an installer does."""
    folder = tmp_path_factory.mktemp("packaging")
    left = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
    (folder / "clone").mkdir()
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "clone" / name, symlinks=True, ignore=left)
        else:
            shutil.copy(ROOT / name, folder / "clone")
    code = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"
    python("-c", code.format("sdist", str(folder)), cwd=folder / "clone")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    shutil.rmtree(folder / "clone")
    python("-c", code.format("wheel", str(folder)), cwd=next(path for path in folder.glob("softkv-*") if path.is_dir()))
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    def files(folder: Path, under: str) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {f"{under}{path.relative_to(folder)}" for path in found}

    links = ("softkv/kernels", "softkv/benchmarks")  # links in a clone, folders in a wheel
    here = {name for name in files(ROOT / "softkv", "softkv/") if not name.startswith(links)}
    here |= files(ROOT / "kernels", "softkv/kernels/") | files(ROOT / "benchmarks", "softkv/benchmarks/")
    here = {name for name in here if not name.startswith("softkv/benchmarks/results/")}
    assert {name for name in files(wheel, "") if ".dist-info/" not in name} == here


def test_installed_modules_import_neither_tests_nor_a_clones_folders(wheel: Path) -> None:
    for path in wheel.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            wrong = {name.partition(".")[0] for name in names} & {"tests", "benchmarks", "kernels", "examples"}
            assert not wrong, f"{path.relative_to(wheel)} imports {wrong}"


def test_the_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    code = """if True:
        import softkv, softkv.kernels, sys
        from softkv.benchmarks import movie_snippets, tiny
        model, tokenizer = tiny.load()
        softkv.attach(model, softkv.PrefixTuning(length=2))
        assert all(sys.argv[1] in module.__file__ for module in (softkv, softkv.kernels, tiny))
        print(len(movie_snippets.read("test")))"""
    assert int(python("-c", code, str(wheel), cwd=tmp_path, PYTHONPATH=str(wheel))) > 100
    assert "softkv.cli:app" in next(wheel.glob("*.dist-info/entry_points.txt")).read_text()
    assert "Train, measure and use soft prompts" in python(
        "-m", "softkv.cli", "--help", cwd=tmp_path, PYTHONPATH=str(wheel)
    )
