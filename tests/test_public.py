"""The names of `import iam_jax`."""

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import iam_jax

EXPORTS = [name for name in iam_jax.__all__ if name != "__version__"]


def test_importing_the_package_imports_nothing_but_the_standard_library():
    program = "import sys; before = set(sys.modules); import iam_jax; print(*set(sys.modules) - before)"
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    packages = {name.partition(".")[0] for name in imported}
    assert "iam_jax" in packages and packages - {"iam_jax"} <= set(sys.stdlib_module_names)
    assert [name for name in imported if name.startswith("iam_jax.")] == []


@pytest.mark.parametrize("name", EXPORTS)
def test_every_name_is_the_one_of_its_home(name):
    home = import_module(iam_jax._HOMES[name])
    assert getattr(iam_jax, name) is getattr(home, name)
    assert getattr(iam_jax, name).__doc__, "public, but without a docstring"


def test_names_are_listed_alike_everywhere():
    assert dir(iam_jax) == sorted(iam_jax.__all__) == sorted([*iam_jax._HOMES, "__version__"])
    tree = ast.parse(Path(iam_jax.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == iam_jax._HOMES


def test_no_name_is_a_submodule():
    # Importing a submodule sets the attribute of that name on the package: it would replace the function.
    submodules = {module.name for module in pkgutil.iter_modules(iam_jax.__path__)} | {"configs"}
    assert {"config", "kernels", "main"} <= submodules and submodules.isdisjoint(EXPORTS)


def test_other_names_do_not_exist():
    with pytest.raises(AttributeError, match="module 'iam_jax' has no attribute 'nothing'"):
        iam_jax.nothing  # noqa: B018
    with pytest.raises(ImportError, match="nothing"):
        from iam_jax import nothing  # noqa: F401
