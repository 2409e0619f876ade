"""The settings that a Python file assigns, as nanoGPT's config files do; nothing of it is run."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
LIMIT = 1e18  # of numbers, so that a file cannot ask for hours of arithmetic


def read_assignments(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The names that a Python text assigns at its top level.

    Returns:
        The values by name, where they are literals or plain arithmetic of them and of earlier
        names; and why, by the name or line of each statement that is not read.

    Raises:
        ValueError: it is not Python.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not valid Python: {error}") from None
    values: dict[str, Any] = {}
    unread: dict[str, str] = {}
    for statement in tree.body:
        _read(statement, values, unread)
    return values, unread


def _read(statement: ast.stmt, values: dict[str, Any], unread: dict[str, str]) -> None:
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    if is_text or isinstance(statement, ast.Import | ast.ImportFrom | ast.Pass):
        return
    target: ast.expr | None = None
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    value = getattr(statement, "value", None)
    if not isinstance(target, ast.Name) or value is None:
        unread[f"line {statement.lineno}"] = "only NAME = VALUE is read; nothing is run"
        return
    values.pop(target.id, None)  # what it was before holds no longer
    unread.pop(target.id, None)
    try:
        values[target.id] = _value(value, values)
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        unread[target.id] = f"line {statement.lineno}: {error}"


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Raises ValueError, TypeError or ArithmeticError where it is more than plain arithmetic."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element, names) for element in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(_value(node.operand, names))
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return _computed(node, names)
    raise ValueError(f"{ast.unparse(node)[:60]} is more than a literal or arithmetic")


def _computed(node: ast.BinOp, names: Mapping[str, Any]) -> float:
    left, right = _value(node.left, names), _value(node.right, names)
    if not {type(left), type(right)} <= {int, float}:
        raise ValueError(f"{ast.unparse(node)[:60]} is more than a literal or arithmetic")
    if isinstance(node.op, ast.Pow) and not (abs(left) <= 1e6 and abs(right) <= 64):
        raise ValueError(f"{ast.unparse(node)[:60]} is too large")
    return _number(ARITHMETIC[type(node.op)](left, right))


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < LIMIT:
        raise ValueError(f"{value!r:.60} is no number to compute with")
    return value
