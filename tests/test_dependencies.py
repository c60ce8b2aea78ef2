"""What the package imports is declared in pyproject.toml, and what is declared is imported."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ssl_distill"
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "nuscenes": "nuscenes-devkit"}  # named otherwise than their module


def imports(source: str) -> Iterator[str]:
    """Every module that is imported from outside: at the top, in functions, and by name (`import_module("x")`)."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                yield from (each.name for each in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
            case ast.Call(ast.Name(name) | ast.Attribute(attr=name), [ast.Constant(str(module)), *_]) if (
                name.startswith("import_")
            ):
                yield module


def imported(folder: Path, own: set[str]) -> dict[str, str]:
    """Distributions that the files of a folder need besides our own modules, and one file that imports each."""
    found = {}
    for path in folder.rglob("*.py"):
        for module in imports(path.read_text(encoding="utf-8")):
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in own:
                found[DISTRIBUTIONS.get(top, top)] = str(path.relative_to(ROOT))
    return found


def declared() -> dict[str, set[str]]:
    """Distributions by extra; those that are always installed under an empty name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in group}
        for extra, group in groups.items()
    }


def test_imports_are_found():
    source = (
        'import a.b, c\nfrom . import no\ndef f():\n    from d.e import g\n    import_parts("h.i")\n    print("no")'
    )
    assert set(imports(source)) == {"a.b", "c", "d.e", "h.i"}


def test_the_package_declares_what_it_imports():
    extras = {extra: names for extra, names in declared().items() if extra != "dev"}
    undeclared = {
        name: path
        for name, path in imported(PACKAGE, {"ssl_distill"}).items()
        if name not in set().union(*extras.values())
    }
    assert not undeclared


def test_the_package_imports_what_it_declares():
    extras = {extra: names for extra, names in declared().items() if extra != "dev"}
    unused = set().union(*extras.values()) - imported(PACKAGE, {"ssl_distill"}).keys()
    assert not unused


def test_tests_declare_what_they_import():
    extras = declared()
    own = {"ssl_distill", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    found = imported(ROOT / "tests", own)
    assert not {name: path for name, path in found.items() if name not in extras[""] | extras["dev"]}
