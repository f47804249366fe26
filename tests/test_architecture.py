"""The picture of folders in docs/design.md is what the code imports, and it has a top and a bottom."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "softkv"
LINKS = ("softkv/kernels", "softkv/benchmarks")  # to folders beside it


class Import(NamedTuple):
    importer: str
    imported: str
    at_import: bool  # not inside a function


@cache
def modules() -> dict[str, Path]:
    """Every module of softkv/, kernels/ and benchmarks/ by its name in the package."""
    found = {}
    for folder in ("softkv", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT).as_posix()
            if not relative.startswith(LINKS):
                name = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                found[name if folder == "softkv" else f"{PACKAGE}.{name}"] = path
    return found


def names_in(tree: ast.AST, package: str, in_function: bool = False) -> Iterator[tuple[str, bool]]:
    """(what is imported, whether when the module is), those for type checkers left out. Modules that are named in a
    text are imported by it: a table of engines, the lazy names of `softkv`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                names = [".".join([*parts, *filter(None, [node.module]), name]) for name in names]
            else:
                names = [f"{node.module}.{name}" for name in names]
            yield from ((name, not inside) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, not inside) for alias in node.names)
        elif isinstance(node, ast.Constant) and node.value in modules() and node.value != PACKAGE:
            yield str(node.value), False
        yield from names_in(node, package, inside)


def names_of(module: str) -> Iterator[tuple[str, bool]]:
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return names_in(ast.parse(path.read_text(encoding="utf-8")), package)


@cache
def imports() -> tuple[Import, ...]:
    found = []
    for name in modules():
        for imported, at_import in names_of(name):
            imported = re.sub(r"^benchmarks\b", f"{PACKAGE}.benchmarks", imported)  # both names are one folder
            if imported.partition(".")[0] == PACKAGE:
                while imported not in modules():
                    imported = imported.rpartition(".")[0]
                found.append(Import(name, imported, at_import))
    return tuple(found)


def folder_of(module: str) -> str:
    """The folder of a module, or the module itself where it lies in none."""
    return module.split(".")[1] if "." in module else module


def edges() -> set[tuple[str, str]]:
    pairs = {(folder_of(each.importer), folder_of(each.imported)) for each in imports()}
    return {(importer, imported) for importer, imported in pairs if importer != imported}


def picture() -> dict[str, list[str]]:
    """What each folder imports, by the picture, from top to bottom."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    lines = re.search(r"## Dependencies\n.*?^```\n(.*?)^```", text, re.S | re.M)
    assert lines is not None
    return {name: below.split() for name, below in re.findall(r"^(\w+) +→ ?(.*)$", lines[1], re.M)}


def circle(of: dict[str, set[str]]) -> list[str]:
    """Names that lead back to themselves, or none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for below in sorted(of.get(name, ())):
            if found := walk(below, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(of) if (found := walk(name, []))), [])


def test_the_picture_is_what_the_code_imports() -> None:
    drawn = {(name, below) for name, row in picture().items() for below in row}
    assert drawn == edges(), f"not drawn: {edges() - drawn}; not imported: {drawn - edges()}"


def test_arrows_point_downward_only() -> None:
    order = list(picture())
    assert [(name, below) for name, row in picture().items() for below in row if below not in order] == []
    assert [(a, b) for a, row in picture().items() for b in row if order.index(b) <= order.index(a)] == []


@pytest.mark.parametrize("only_at_import", [True, False], ids=["when imported", "inside functions too"])
def test_no_module_leads_back_to_itself(only_at_import: bool) -> None:
    of: dict[str, set[str]] = {}
    for each in imports():
        if each.at_import or not (only_at_import or folder_of(each.importer) == "benchmarks"):
            of.setdefault(each.importer, set()).add(each.imported)
    of = {name: below - {name} for name, below in of.items()}
    assert circle(of) == []


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}}) == ["b", "c", "b"]


def reached_from(module: str) -> set[str]:
    reached, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [each.imported for each in imports() if each.importer == name]
    return reached


def test_models_know_no_storage_and_kernels_nothing_of_softkv() -> None:
    assert "softkv.ops.api" in reached_from("softkv.hf.model")
    assert not {name for name in reached_from("softkv.hf.model") if name.startswith(("softkv.io", "softkv.train"))}
    assert {folder_of(name) for name in reached_from("softkv.kernels")} == {"kernels"}
    kernels = [module for module in modules() if folder_of(module) == "kernels"]
    outside = {name.partition(".")[0] for module in kernels for name, _ in names_of(module)}
    assert {"torch", "triton"} <= outside
    assert not outside & {"transformers", "peft", "safetensors", "numpy", "rich", "typer"}


def test_methods_know_neither_transformers_nor_kernels() -> None:
    reached = {folder_of(name) for name in reached_from("softkv.methods")}
    assert reached == {"methods", "prefix"}
    for module in modules():
        if folder_of(module) in ("methods", "prefix", "ops"):
            assert "transformers" not in {name.partition(".")[0] for name, _ in names_of(module)}, module


def test_transformers_model_families_are_no_table() -> None:
    """A new family needs no code: none of softkv's modules picks code by the type of a model."""
    by_type = [
        f"{name}: {ast.unparse(node)}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and re.search(r"\bmodel_type\b", ast.unparse(node.left))
        and any(isinstance(value, ast.Constant | ast.Tuple | ast.Set | ast.List) for value in node.comparators)
        and any(isinstance(one, ast.Constant) and isinstance(one.value, str) for one in ast.walk(node))
    ]  # fmt: skip
    assert by_type == []


def test_no_two_classes_share_a_name() -> None:
    where: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(module)
    assert {name: found for name, found in where.items() if len(found) > 1} == {}


def test_files_named_in_the_table_exist() -> None:
    """Rows of bold names are folders; the files of the rows below lie in them."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    folder = ROOT
    for names in re.findall(r"^\| (.+?) \|", text, re.M):
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", names):
            if names.startswith("**"):
                folder = (ROOT / name) if name.endswith("/") else ROOT
                assert (ROOT / name).exists(), name
            else:
                assert (folder / name).exists(), f"{folder.name}/{name}"
