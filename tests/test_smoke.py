"""`pytest -m smoke` runs something of every module."""

import ast
from pathlib import Path

from smoke import SMOKE

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "iam_jax"


def test_every_module_has_a_smoke_test():
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.stat().st_size}
    assert SMOKE.keys() == modules


def test_every_smoke_test_is_there():
    for test in SMOKE.values():
        file, _, name = test.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name.partition("[")[0] in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], test


def test_every_smoke_test_is_marked(request):
    """By conftest.py; with its parameters, which only the collected tests have."""
    items = request.session.items
    collected = {f"{item.path.name}::{item.name}" for item in items} | {f"{item.path.name}::{item.originalname}" for item in items}
    files = {item.path.name for item in items}
    missing = [test for test in SMOKE.values() if test.partition("::")[0] in files and test not in collected]
    assert len(items) < 500 or not missing  # fewer: only some of the tests were asked for
    marked = [item for item in items if item.get_closest_marker("smoke")]
    assert {f"{item.path.name}::{item.originalname}" for item in marked} <= {test.partition("[")[0] for test in SMOKE.values()}
