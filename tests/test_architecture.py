"""The floors of the house, read off the imports, and habits that a reader should not have to look for."""

import ast
import io
import itertools
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "sparsejax", ROOT / "tests"

FLOORS = (
    {"base"},
    {"ops"},
    {"nn"},
    {"routers"},
    {"memory"},
    {"blocks"},
    {"model"},
    {"data"},
    {"train"},
    {"infer"},
    {"plan"},
    {"report"},
    {"launch"},
    {"ablate"},
    {"cli", "__init__"},  # the package itself offers what users' config files need, when they ask for it
    {"__main__"},
)
"""From the ground up. A part imports from its own package and from lower floors, never upwards or sideways."""

ONLY = {"data": {"base"}}
"""Parts that use less of what lies below than they could."""

WITHOUT = {"base": {"flax"}, "ops": {"flax"}, "tests/reference": {"jax", "jaxlib", "flax", "sparsejax"}}
"""Parts and the packages that they have no business with."""

HEIGHT = {part: height for height, parts in enumerate(FLOORS) for part in parts}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of everything a file imports, inside functions, too; relative imports resolved."""
    package = path.relative_to(ROOT).parts[:-1]
    found = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_has_a_floor():
    parts = {part_of(path) for path in sources(PACKAGE)}
    assert parts <= set(HEIGHT), f"no floor is known for {parts - set(HEIGHT)}"


@pytest.mark.parametrize("part", sorted({part_of(path) for path in sources(PACKAGE)}))
def test_imports_go_downwards_only(part):
    wrong = []
    for path in sources(PACKAGE):
        if part_of(path) != part:
            continue
        for line, module in imports(path):
            names = module.split(".")
            if names[0] != "sparsejax" or len(names) < 2 or names[1] in (part, "__version__"):
                continue
            other = names[1] if names[1] in HEIGHT else "__init__"
            allowed = other in ONLY[part] if part in ONLY else HEIGHT[other] < HEIGHT[part]
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", WITHOUT)
def test_parts_that_do_without_a_package(part):
    folder = ROOT / part if part.startswith("tests") else PACKAGE / part
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(folder)
        for line, module in imports(path)
        if module.split(".")[0] in WITHOUT[part]
    ]
    assert sources(folder) and not wrong, "\n".join(wrong)


def test_nothing_imports_tensorflow():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources(PACKAGE)
        for line, module in imports(path)
        if module.split(".")[0] in ("tensorflow", "tensorboard")
    ]
    assert not wrong, wrong


def test_defaults_live_in_the_schema_alone():
    """`config.get('key', default)` hides a default where nobody looks for it; a locked config raises instead."""
    wrong = []
    for path in sources(PACKAGE):
        for node in ast.walk(parse(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get"):
                continue
            receiver = ast.unparse(node.func.value).lower()
            if any(word in receiver for word in ("config", "cfg", "spec")):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def comments(path: Path) -> list[tuple[int, str]]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def test_no_promises_in_comments():
    marks = ("TODO", "FIXME", "XXX", "HACK")
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {comment}"
        for path in sources(PACKAGE) + sources(TESTS)
        for line, comment in comments(path)
        if any(mark in comment for mark in marks)
    ]
    assert not wrong, "\n".join(wrong)


def compares_with_itself(node: ast.AST) -> bool:
    """`x == x` and `assert_close(x, x)` hold whatever x is. A call is left alone: it may differ from its repetition."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
    elif isinstance(node, ast.Call) and any(word in ast.unparse(node.func) for word in ("equal", "close")):
        sides = node.args[:2]
    else:
        return False
    fixed = [side for side in sides if not any(isinstance(n, ast.Call) for n in ast.walk(side))]
    return any(ast.dump(a) == ast.dump(b) for a, b in itertools.pairwise(fixed))


def test_no_test_compares_a_value_with_itself():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for path in sources(TESTS)
        for node in ast.walk(parse(path))
        if compares_with_itself(node)
    ]
    assert not wrong, "\n".join(wrong)
