"""The floors of docs/design.md, checked on the source, and what importing scllm leaves out."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "scllm"

MAX_FUNCTION_LINES = 60

# package -> the other packages of scllm that it may import; every floor may import the root
FLOORS = {
    "root": set(),
    "kernels": set(),
    "metrics": {"kernels"},
    "data": {"kernels"},
    "models": {"data", "kernels"},
    "engine": {"models", "data", "metrics", "kernels"},
    "pp": {"models", "data", "kernels"},
    "tl": {"engine", "models", "data", "metrics", "kernels"},
    "pl": {"data", "metrics", "kernels"},
    "datasets": {"data", "kernels"},
    "cli": {"datasets", "pp", "pl", "tl", "engine", "models", "data", "metrics", "kernels"},
}
# package -> what it must not import, not even inside a function
FORBIDDEN = {
    "root": {"torch", "transformers", "scanpy", "numba", "matplotlib"},
    "kernels": {"scipy", "pandas", "anndata", "torch", "transformers", "scanpy", "matplotlib", "sklearn"},
    "metrics": {"anndata", "torch", "transformers", "scanpy", "matplotlib"},
    "data": {"torch", "transformers", "scanpy", "matplotlib"},
    "models": {
        "scllm.data.source",
        "scllm.data.cells",
        "scllm.data.arrays",
        "scllm.data.plan",
        "anndata",
        "scanpy",
        "matplotlib",
    },
    "engine": {"scanpy", "matplotlib"},
    "pp": {"transformers", "matplotlib"},
    "tl": {"matplotlib"},
    "pl": {"torch", "transformers"},
    "datasets": {"torch", "transformers", "matplotlib"},
    "cli": set(),
}
# slow or optional: never at the top of a module
INSIDE_FUNCTIONS = {
    *("scanpy", "igraph", "pynndescent", "cellxgene_census", "tiledbsoma", "scib_metrics", "peft", "torchao"),
    *("annbatch", "spatialdata", "squidpy", "tifffile", "harmonypy", "mudata", "datasets", "tensorboard", "wandb"),
    "rdkit",
}
# core dependency that the source does not import -> what needs it
NEEDED_BY_OTHERS = {
    "scikit-misc": "scanpy.pp.highly_variable_genes(flavor='seurat_v3')",
    "pynndescent": "scanpy.pp.neighbors of 8,192 cells or more, in a version that it can read",
}
# (module, function) -> why a dense array is right there
DENSE_ALLOWED: dict[tuple[str, str], str] = {
    ("scllm.data.targets", "dense"): "the predicted genes of a batch of spots, or of the spots of one section",
}


@dataclass(frozen=True)
class Import:
    """One import of one module, named in full."""

    module: str
    line: int
    at_top: bool


@dataclass(frozen=True)
class Module:
    """One file of the source."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """Floor to which the module belongs: a package's name, `cli`, or `root`."""
        parts = self.name.split(".")
        if self.name in {"scllm.cli", "scllm.__main__"}:
            return "cli"
        return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "root"

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))


@cache
def source() -> dict[str, Module]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, text, ast.parse(text))
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(module: Module) -> list[Import]:
    """All that the module imports when it runs; what only a type checker sees is left out."""

    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child):
                continue
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module.name}:{child.lineno} imports relatively"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield Import(full if full in source() else str(child.module), child.lineno, at_top)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, at_top and not inside)

    return list(visit(module.tree, at_top=True))


def starts_with(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def functions(module: Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node


def calls(module: Module) -> Iterator[tuple[str, ast.Call]]:
    """Each call with the name of the function that holds it."""

    def visit(node: ast.AST, holder: str) -> Iterator[tuple[str, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else holder
            if isinstance(child, ast.Call):
                yield holder, child
            yield from visit(child, inner)

    return visit(module.tree, "")


def test_source_has_all_packages() -> None:
    packages = {module.package for module in source().values()}
    assert packages == set(FLOORS)
    assert len(source()) > 30
    assert sum(len(imports(module)) for module in source().values()) > 100


@pytest.mark.parametrize("package", FLOORS)
def test_imports_point_down(package: str) -> None:
    allowed = FLOORS[package] | {package, "root"}
    wrong = [
        f"{module.name}:{found.line} imports {found.module}"
        for module in source().values()
        if module.package == package
        for found in imports(module)
        if found.module in source() and source()[found.module].package not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("package", FLOORS)
def test_floor_leaves_out_what_it_must(package: str) -> None:
    wrong = [
        f"{module.name}:{found.line} imports {found.module}"
        for module in source().values()
        if module.package == package
        for found in imports(module)
        if any(starts_with(found.module, name) for name in FORBIDDEN[package])
    ]
    assert not wrong


def test_imports_have_no_circles() -> None:
    graph = {
        name: {found.module for found in imports(module) if found.at_top and found.module in source()} - {"scllm"}
        for name, module in source().items()
        if name != "scllm"
    }
    assert sum(map(len, graph.values())) > 30
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_pp_imports_torch_inside_functions_only() -> None:
    wrong = [
        f"{module.name}:{found.line} imports {found.module}"
        for module in source().values()
        if module.package == "pp"
        for found in imports(module)
        if found.at_top and (found.module.split(".")[0] == "torch" or found.module.startswith("scllm.models"))
    ]
    assert not wrong


def test_nothing_imports_the_package_root() -> None:
    wrong = [
        f"{module.name}:{found.line}"
        for module in source().values()
        if module.package != "cli"
        for found in imports(module)
        if found.module == "scllm"
    ]
    assert not wrong


def test_slow_and_optional_packages_are_imported_inside_functions() -> None:
    wrong = [
        f"{module.name}:{found.line} imports {found.module}"
        for module in source().values()
        for found in imports(module)
        if found.at_top and any(starts_with(found.module, name) for name in INSIDE_FUNCTIONS)
    ]
    assert not wrong


distributions = cache(packages_distributions)  # reads the list of files of every installed package


def distribution(module: str) -> str:
    """Name on PyPI of what a module belongs to."""
    package = module.split(".")[0]
    return distributions().get(package, [package])[0].lower().replace("_", "-")


def declared(*lists: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for each in lists for requirement in each}


@cache
def third_party_imports() -> list[tuple[str, str, Import]]:
    """Distribution, importing module and import of everything from outside."""
    ours = {"scllm", *sys.stdlib_module_names}
    return [
        (distribution(found.module), module.name, found)
        for module in source().values()
        for found in imports(module)
        if found.module.split(".")[0] not in ours
    ]


def test_core_dependencies_are_imported_or_needed_by_one_that_is() -> None:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    imported = {name for name, _, _ in third_party_imports()}
    assert declared(project["dependencies"]) == imported & declared(project["dependencies"]) | set(NEEDED_BY_OTHERS)


def test_imported_packages_are_declared() -> None:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = declared(project["dependencies"])
    extras = declared(*(names for extra, names in project["optional-dependencies"].items() if extra != "test"))
    wrong = [
        f"{module}:{found.line} imports {found.module} of {name}"
        for name, module, found in third_party_imports()
        if name not in (core if found.at_top else core | extras)
    ]
    assert not wrong


def test_functions_are_short() -> None:
    # the body without docstring and signature; `fit` is the one loop, read from top to bottom
    long, walked = [], 0
    for module in source().values():
        for name, node in functions(module):
            walked += 1
            body = node.body[1:] if ast.get_docstring(node) else node.body
            n_lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            if n_lines > MAX_FUNCTION_LINES and name != "fit":
                long.append(f"{module.name}.{name}: {n_lines}")
    assert walked > 100
    assert not long


def test_public_modules_say_what_is_public() -> None:
    wrong, walked = [], 0
    for module in source().values():
        body = module.tree.body
        defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body)
        exports = any(starts_with(found.module, "scllm") for found in imports(module))
        is_namespace = module.path.name == "__init__.py" and exports
        if not module.is_public or not (defines or is_namespace):
            continue
        walked += 1
        assigned = {target.id for node in body for target in _targets(node) if isinstance(target, ast.Name)}
        if "__all__" not in assigned:
            wrong.append(module.name)
    assert walked > 20
    assert not wrong


def _targets(node: ast.stmt) -> list[ast.expr]:
    match node:
        case ast.Assign():
            return list(node.targets)
        case ast.AnnAssign() | ast.AugAssign():
            return [node.target]
    return []


def test_library_does_not_print() -> None:
    wrong = [
        f"{module.name}:{call.lineno}"
        for module in source().values()
        if module.package != "cli"
        for _, call in calls(module)
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]
    assert not wrong


def test_loading_never_executes_code() -> None:
    wrong = []
    for module in source().values():
        for _, call in calls(module):
            name = ast.unparse(call.func)
            is_pickle = name in {"pickle.load", "pickle.loads", "eval", "exec"}
            is_trusting = any(
                k.arg in {"weights_only", "allow_pickle"} and ast.unparse(k.value) != str(k.arg == "weights_only")
                for k in call.keywords
            )
            forgets = name == "torch.load" and not any(k.arg == "weights_only" for k in call.keywords)
            if is_pickle or is_trusting or forgets:
                wrong.append(f"{module.name}:{call.lineno} calls {name}")
    assert not wrong


def test_matrices_stay_sparse() -> None:
    dense = {
        (module.name, holder)
        for module in source().values()
        for holder, call in calls(module)
        if isinstance(call.func, ast.Attribute) and call.func.attr in {"toarray", "todense"}
    }
    assert dense == set(DENSE_ALLOWED), "add a reason to DENSE_ALLOWED, or take a stale one out"


def loaded_after(statement: str) -> set[str]:
    """Names in `sys.modules` of a fresh interpreter after the statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_import_scllm_is_light() -> None:
    loaded = loaded_after("import scllm")
    assert "scllm" in loaded
    assert not loaded & {"torch", "transformers", "scanpy", "numba", "anndata"}


@pytest.mark.parametrize("namespace", ["pp", "pl", "get", "datasets", "settings"])
def test_namespace_leaves_torch_and_scanpy_out(namespace: str) -> None:
    loaded = loaded_after(f"import scllm.{namespace}")
    assert f"scllm.{namespace}" in loaded
    assert not loaded & {"torch", "transformers", "scanpy"}


def test_namespaces_load_on_first_use() -> None:
    loaded = loaded_after("import scllm; scllm.pp.bin_expression")
    assert "scllm.pp" in loaded
    assert "scllm.tl" not in loaded


def test_a_namesake_beside_is_explained(tmp_path: Path) -> None:
    folder = tmp_path / "scllm-0.3.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: scllm\nVersion: 0.3\n")
    run = subprocess.run(
        [sys.executable, "-c", "import scllm; scllm.settings"], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert "scllm 0.3 of another project" in run.stderr
    assert "pip uninstall scllm scllm-tools" in run.stderr
