"""Public functions say which shapes their tensors have, in annotation, name or docstring, and what they refuse."""

import ast
import re
from pathlib import Path

import pytest

from mogan.cli import COMMANDS

SOURCE = Path(__file__).parent.parent / "src" / "mogan"
# what a docstring calls a shape: ``(B, C, F, H, W)``, or words for those that a tuple cannot say
SHAPE = re.compile(r"``\([^`()]+,[^`()]*\)``|\b[Ss]calar|\bany shape\b|\bsame shape\b|\bshape of\b")
NAMED = re.compile(r"_[A-Z0-9]*[A-Z][A-Z0-9]*$")  # x_BCFHW
TENSOR = r"(?:torch\.Tensor|np\.ndarray|Tensor)"


def says_no_shape(annotation: ast.expr | None) -> bool:
    """Whether it holds a bare tensor: one with a shape is ``Float[Tensor, "b c"]``, and a state dict's are the network's."""
    text = "" if annotation is None else ast.unparse(annotation)
    text = re.sub(rf"\w+\[{TENSOR}, [^\]]*\]", "", text)
    text = re.sub(rf"\w+\[str, {TENSOR}(?: \| None)?\]", "", text)
    return re.search(rf"(?<!\w){TENSOR}\b", text) is not None


def functions(tree: ast.Module):
    """Public functions and methods, with the docstring by which one knows them."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            about = ast.get_docstring(node) or ""
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (
                    method.name == "__call__" or not method.name.startswith("_")
                ):
                    says = ast.get_docstring(method) or ""
                    # a module is known by its class as much as by its call
                    yield method, f"{says} {about}" if method.name in ("__call__", "forward") else says


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_shapes_are_said(path):
    lacking = []
    for function, docstring in functions(ast.parse(path.read_text())):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [a.arg for a in arguments if says_no_shape(a.annotation) and not NAMED.search(a.arg)]
        if says_no_shape(function.returns) and not NAMED.search(function.name):
            bare.append("what it returns")
        if bare and not SHAPE.search(docstring):
            lacking.append(f"{path.name}:{function.lineno} {function.name}: {', '.join(bare)}")
    assert not lacking, "no shape in annotation, name or docstring: " + "; ".join(lacking)


def refuses(function: ast.FunctionDef) -> bool:
    """Whether it raises UserError itself."""
    raised = [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc is not None]
    return any(isinstance(exc, ast.Call) and ast.unparse(exc.func) == "UserError" for exc in raised)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_refusals_are_said(path):
    """Of commands, whose docstring is their --help, everybody knows that they refuse what makes no sense."""
    commands = {place.split(":")[1] for place, _ in COMMANDS.values()}
    lacking = [
        f"{path.name}:{function.lineno} {function.name}"
        for function, docstring in functions(ast.parse(path.read_text()))
        if refuses(function)
        and function.name not in commands
        and not re.search("UserError|[Rr]efuse|^Raise", docstring)
    ]
    assert not lacking, "raises UserError and does not say so: " + "; ".join(lacking)
