"""`_core.pyi` matches the compiled module: the same names, parameters and optional arguments."""

import ast
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import nplora
from nplora import _core


class Parameter(NamedTuple):
    name: str
    optional: bool  # None is accepted
    default: bool


class Signature(NamedTuple):
    parameters: tuple[Parameter, ...]
    returns: str


def signature(function: ast.FunctionDef) -> Signature:
    arguments = function.args.args
    defaults = [False] * (len(arguments) - len(function.args.defaults)) + [True] * len(function.args.defaults)
    returns = ast.unparse(function.returns) if function.returns else "None"
    return Signature(
        tuple(
            Parameter(argument.arg, bool(re.search(r"\bNone\b", ast.unparse(argument.annotation))), default)
            if argument.annotation
            else Parameter(argument.arg, False, default)
            for argument, default in zip(arguments, defaults, strict=True)
        ),
        re.sub(r"\[.*", "", returns).removeprefix("numpy.").removeprefix("nplora._core."),
    )


def stub_members(body: list[ast.stmt]) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


STUB = ast.parse(Path(nplora.__file__).with_name("_core.pyi").read_text())
STUB_FUNCTIONS = stub_members(STUB.body)
STUB_CLASSES = {node.name: stub_members(node.body) for node in STUB.body if isinstance(node, ast.ClassDef)}
STUB_VALUES = {
    node.target.id: ast.unparse(node.annotation) for node in STUB.body if isinstance(node, ast.AnnAssign)
}
STUB_TUPLES = {
    node.name: tuple(field.target.id for field in node.body if isinstance(field, ast.AnnAssign))
    for node in STUB.body
    if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["NamedTuple"]
}


def compiled_signatures(doc: str | None) -> set[Signature]:
    """The signatures that pybind11 writes into a docstring: one per line, numbered if there are several."""
    lines = re.findall(r"^(?:\d+\. )?(\w+\(.*\)(?: -> .+)?)$", doc or "", flags=re.MULTILINE)
    assert lines, f"no signature in {doc!r}"
    functions = [ast.parse(f"def {line}: ...").body[0] for line in lines if "*args, **kwargs" not in line]
    return {signature(function) for function in functions if isinstance(function, ast.FunctionDef)}


def public(names: list[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def test_the_stub_has_the_names_of_the_compiled_module() -> None:
    assert public(dir(_core)) == set(STUB_FUNCTIONS) | set(STUB_CLASSES) | set(STUB_VALUES)


def test_values_have_the_types_of_their_stub() -> None:
    assert {name: type(getattr(_core, name)).__name__ for name in STUB_VALUES} == STUB_VALUES
    assert all(type(value) is int and value > 0 for value in _core.constants)


@pytest.mark.parametrize("name", sorted(STUB_FUNCTIONS))
def test_a_function_has_the_parameters_of_its_stub(name: str) -> None:
    assert compiled_signatures(getattr(_core, name).__doc__) == {signature(STUB_FUNCTIONS[name])}


@pytest.mark.parametrize("name", sorted(STUB_TUPLES))
def test_a_named_tuple_has_the_fields_of_its_stub(name: str) -> None:
    compiled = getattr(_core, name)
    assert compiled._fields == STUB_TUPLES[name]
    assert (compiled.__name__, compiled.__module__) == (name, "nplora._core")


@pytest.mark.parametrize("name", sorted(STUB_CLASSES.keys() - STUB_TUPLES.keys()))
def test_a_class_has_the_members_of_its_stub(name: str) -> None:
    compiled, stub = getattr(_core, name), STUB_CLASSES[name]
    assert public(dir(compiled)) == public(list(stub))
    for member, node in stub.items():
        value = inspect.getattr_static(compiled, member)
        value = getattr(value, "__func__", value)  # for a static method
        if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
            (found,) = compiled_signatures(f"{member}{value.fget.__doc__}")
            stated = signature(node).returns
            if found.returns == "str":  # C++ text; only the stub says that it may be None
                stated = stated.removesuffix(" | None")
            assert found.returns == stated, member
        else:
            stated = signature(node)
            found_here = {  # C++ returns an object; the stub is more precise
                s._replace(returns=stated.returns) if s.returns == "object" else s
                for s in compiled_signatures(value.__doc__)
            }
            assert found_here == {stated}, member
