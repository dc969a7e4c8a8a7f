"""The rules that every public verb keeps."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scllm import _keys

SOURCE = Path(__file__).parents[1] / "src" / "scllm"
NAMESPACES = ("pp", "tl", "pl")
FIRST = {"adata", "data", "model", "source"}
SECOND = {"vocab", "model", "reference"}
# attributes of an AnnData whose keys stand in _keys.py
SLOTS = {"obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"}
SECTIONS = {"Parameters", "Returns", "Writes", "Raises", "Warns", "Notes", "References", "Examples", "See Also"}


def verbs() -> dict[str, Callable]:
    found = {}
    for space in NAMESPACES:
        module = importlib.import_module(f"scllm.{space}")
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                found[f"{space}.{name}"] = thing
    return found


VERBS = verbs()
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


def parameters(verb: Callable) -> list[inspect.Parameter]:
    return list(inspect.signature(verb).parameters.values())


def sections(verb: Callable) -> dict[str, list[str]]:
    """Split a numpy docstring: title -> lines; the text before the first title has none."""
    lines = inspect.cleandoc(verb.__doc__ or "").splitlines()
    found: dict[str, list[str]] = {"": []}
    title = ""
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if below and not below.strip("-") and line in SECTIONS:
            title = line
            found[title] = []
        elif not (line and not line.strip("-")):
            found[title].append(line)
    return found


def documented(verb: Callable) -> list[str]:
    """Names in the section `Parameters`; several may share a line."""
    heads = [line for line in sections(verb).get("Parameters", []) if line and not line.startswith(" ")]
    return [name.strip().lstrip("*") for head in heads for name in re.split(r"\s:|\s*,\s*", head)]


def test_each_namespace_has_verbs() -> None:
    for space in NAMESPACES:
        assert sum(name.startswith(space + ".") for name in VERBS) >= 5


@every_verb
def test_first_parameter_is_what_the_verb_acts_on(verb: Callable) -> None:
    first, *rest = parameters(verb)
    assert first.name in FIRST
    assert first.kind is first.POSITIONAL_OR_KEYWORD
    assert first.default is first.empty
    assert not FIRST & {p.name for p in rest} - SECOND


@every_verb
def test_at_most_two_parameters_are_positional(verb: Callable) -> None:
    positional = [p.name for p in parameters(verb) if p.kind is not p.KEYWORD_ONLY and p.kind is not p.VAR_KEYWORD]
    assert len(positional) <= 2
    assert set(positional[1:]) <= SECOND


@every_verb
def test_copy_comes_last(verb: Callable) -> None:
    names = [p.name for p in parameters(verb)]
    if "copy" in names:
        assert names[-1] == "copy"
        assert parameters(verb)[-1].default is False


@every_verb
def test_parameters_are_annotated(verb: Callable) -> None:
    assert [p.name for p in parameters(verb) if p.annotation is p.empty] == []
    assert inspect.signature(verb).return_annotation is not inspect.Signature.empty


@every_verb
def test_defaults_are_immutable(verb: Callable) -> None:
    assert [p.name for p in parameters(verb) if isinstance(p.default, list | dict | set)] == []


@every_verb
def test_docstring_opens_with_one_sentence(verb: Callable) -> None:
    text = "\n".join(sections(verb)[""]).strip()
    first = text.split("\n\n")[0]
    assert first.endswith(".")
    assert "\n" not in first


@every_verb
def test_docstring_names_each_parameter_in_order(verb: Callable) -> None:
    assert documented(verb) == [p.name for p in parameters(verb)]


@every_verb
def test_docstring_says_what_comes_out(verb: Callable) -> None:
    assert {"Writes", "Returns"} & set(sections(verb))
    if "copy" in inspect.signature(verb).parameters:
        assert "Writes" in sections(verb)


@every_verb
def test_default_keys_stand_in_keys(verb: Callable) -> None:
    known = {value for name, value in vars(_keys).items() if name.isupper()}
    added = inspect.signature(verb).parameters.get("key_added")
    assert added is None or added.default is None or added.default in known


@pytest.mark.parametrize("name", [name for name in VERBS if name.startswith("pl.")])
def test_plots_take_ax_and_show(name: str) -> None:
    found = inspect.signature(VERBS[name]).parameters
    assert found["ax"].default is None
    assert found["show"].default is None


def test_keys_are_listed_once() -> None:
    names = [name for name in vars(_keys) if name.isupper()]
    values = [getattr(_keys, name) for name in names]
    assert set(names) == {name for name in _keys.__all__ if name.isupper()}
    assert len(set(values)) == len(values)
    assert all(isinstance(value, str) for value in values)


def test_written_keys_are_not_spelled_out() -> None:
    """A string is never the key of a write: `adata.obs["x"] = ...` takes its key from _keys.py or the caller."""
    wrong, walked = [], 0
    for path in sorted(p for space in (*NAMESPACES[:2], "datasets") for p in (SOURCE / space).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Attribute):
                continue
            if node.value.attr not in SLOTS:
                continue
            walked += 1
            is_literal = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
            if is_literal and isinstance(node.ctx, ast.Store):
                wrong.append(f"{path.name}:{node.lineno} writes {ast.unparse(node)}")
    assert walked > 5
    assert not wrong


def test_signatures_are_those_of_the_contract(shared: Path) -> None:
    run = subprocess.run([sys.executable, str(shared / "contract.py")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    n_same = re.search(r"^(\d+) as in the contract", run.stdout, re.MULTILINE)
    assert n_same, run.stdout
    assert int(n_same[1]) >= 20
