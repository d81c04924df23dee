"""Checks of Python blocks: they compile, and their imports and calls fit the project."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tempfile
from typing import Any

from document_checks.project import DocumentError, import_name, in_project


def check_python_block(block: str, run: bool) -> None:
    """Checks the syntax of a block, its imports from the project and their calls. With `run`, also runs it.

    Raises:
        DocumentError: for a syntax error, an unknown name or attribute, arguments that do not fit a signature, or
            an error in the run.
    """
    try:
        tree = ast.parse(block)
    except SyntaxError as error:
        raise DocumentError(f"not Python: {error}") from None
    names = project_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            check_call(node, names)
    if run:
        run_python_block(block)


def run_python_block(block: str) -> None:
    """Runs a block in an empty folder. Raises `DocumentError` with the last line of its error if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True)
    if process.returncode:
        raise DocumentError(f"the block fails: {process.stderr.strip().splitlines()[-1]}")


def project_names(tree: ast.AST) -> dict[str, Any]:
    """The names of a block that refer to the project.

    An imported name maps to the imported object. A variable maps to its class, if the block assigns an instance of
    an imported class to it.
    """
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and in_project(node.module or ""):
            for alias in node.names:
                names[alias.asname or alias.name] = import_name(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            imported = names.get(ast.unparse(node.value.func))
            if inspect.isclass(imported):
                names |= {ast.unparse(target): imported for target in node.targets}
    return names


def check_call(call: ast.Call, names: dict[str, Any]) -> None:
    """Checks the arguments of a call of an imported function, or of a method of an imported class.

    Calls with `*arguments` or `**keywords` are not checked, because their arguments are not known.
    """
    arguments: list[Any] = list(call.args)
    if isinstance(call.func, ast.Name) and call.func.id in names:
        function = names[call.func.id]
    elif isinstance(call.func, ast.Attribute) and inspect.isclass(names.get(ast.unparse(call.func.value))):
        owner = names[ast.unparse(call.func.value)]
        function = getattr(owner, call.func.attr, None)
        if function is None:
            raise DocumentError(f"{owner.__name__} has no attribute {call.func.attr}")
        arguments = [None, *arguments]  # self
    else:
        return
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    if any(isinstance(argument, ast.Starred) for argument in call.args) or len(keywords) < len(call.keywords):
        return
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except TypeError as error:
        raise DocumentError(f"{ast.unparse(call.func)}: {error}") from None
