"""Mechanical gates over the library's own code: sizes, twins, imports, documentation."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
import transformers
from torch import nn

PACKAGE = Path(__file__).resolve().parents[1] / "hf_lowrank"
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40  # the docstring not counted
MAX_ARGUMENTS = 8  # self and cls not counted
MIN_TWIN_STATEMENTS = 4  # nested ones counted; shorter bodies may be equal by chance

# A method one of these has is an override, and documented there.
HOSTS = (nn.Module, transformers.PreTrainedModel, transformers.PreTrainedConfig, transformers.TrainerCallback)

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]


def body(node):
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def num_lines(function):
    signature = function.body[0].lineno - function.lineno
    code = body(function)
    return max(signature, 1) + (code[-1].end_lineno - code[0].lineno + 1 if code else 0)


def num_arguments(function):
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([argument for argument in named if argument.arg not in ("self", "cls")])


def too_large(tree, text):
    if len(text.splitlines()) > MAX_FILE_LINES:
        yield f"file has more than {MAX_FILE_LINES} lines"
    for function in functions(tree):
        if num_lines(function) > MAX_FUNCTION_LINES:
            yield f"{function.name} has {num_lines(function)} lines, more than {MAX_FUNCTION_LINES}"
        if num_arguments(function) > MAX_ARGUMENTS:
            yield f"{function.name} has {num_arguments(function)} arguments, more than {MAX_ARGUMENTS}"


def imports_ourselves(node):
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == PACKAGE.name for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.level > 0 or node.module.split(".")[0] == PACKAGE.name)


def bad_imports(tree):
    for function in functions(tree):
        if any(imports_ourselves(node) for node in ast.walk(function)):
            yield f"{function.name} imports our own code inside"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"star import from {node.module}"


def public(nodes):
    return [node for node in nodes if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and not node.name.startswith("_")]


def documented_methods(tree):
    """Class name -> names of its methods that have a docstring."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {node.name: {part.name for part in public(node.body) if ast.get_docstring(part)} for node in classes}


def undocumented(tree, documented):
    """Public names without a docstring; an override of a documented method needs none."""
    if not ast.get_docstring(tree):
        yield "the file"
    for node in public(tree.body):
        if not ast.get_docstring(node):
            yield node.name
        if isinstance(node, ast.ClassDef):
            inherited = set().union(*(documented.get(ast.unparse(base), ()) for base in node.bases))
            for method in public(node.body):
                is_override = method.name in inherited or any(hasattr(host, method.name) for host in HOSTS)
                if not is_override and not ast.get_docstring(method):
                    yield f"{node.name}.{method.name}"


def twins(trees):
    places = defaultdict(list)
    for name, tree in trees.items():
        for function in functions(tree):
            statements = [node for part in body(function) for node in ast.walk(part) if isinstance(node, ast.stmt)]
            if len(statements) >= MIN_TWIN_STATEMENTS:
                places["".join(map(ast.dump, body(function)))].append(f"{name}:{function.name}")
    return [group for group in places.values() if len(group) > 1]


def violations(tree, text, documented):
    return [*too_large(tree, text), *bad_imports(tree), *undocumented(tree, documented)]


@pytest.fixture(scope="module")
def trees():
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


@pytest.fixture(scope="module")
def documented(trees):
    return {name: methods for tree in trees.values() for name, methods in documented_methods(tree).items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_keeps_the_style_budget(path, documented):
    text = path.read_text(encoding="utf-8")

    assert violations(ast.parse(text), text, documented) == []


def test_no_two_functions_have_the_same_body(trees):
    assert twins(trees) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n" * MAX_FILE_LINES, "file has more than"),
        ("def _f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "_f has 41 lines"),
        (f"def _f(self, *, {', '.join(f'x{i}' for i in range(MAX_ARGUMENTS + 1))}): pass", "_f has 9 arguments"),
        ("def _f():\n    from hf_lowrank.records.report import make_report", "imports our own code"),
        ("def _f():\n    import hf_lowrank.records.report", "imports our own code"),
        ("def _f():\n    from .report import make_report", "imports our own code"),
        ("from torch import *", "star import"),
        ("def f(): pass", "f"),
        ("class A: pass", "A"),
        ('class A:\n    "Doc."\n    def f(self): pass', "A.f"),
    ],
)
def test_gate_sees_a_violation(text, message):
    text = f'"""Doc."""\n{text}\n'

    found = violations(ast.parse(text), text, {})

    assert len(found) == 1
    assert message in found[0]


def test_gate_asks_for_the_docstring_of_a_file():
    assert list(undocumented(ast.parse("x = 1"), {})) == ["the file"]


def test_gates_let_code_at_the_limits_and_overrides_pass():
    arguments = ", ".join(f"x{i}" for i in range(MAX_ARGUMENTS))
    code = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    long = f'"""Doc."""\ndef f({arguments}):\n    """\n{code}    """\n{code}'
    override = '"""Doc."""\nclass B(A):\n    "Doc."\n    def root(self): pass\n    def forward(self): pass\n'

    assert violations(ast.parse(long), long, {}) == []
    assert violations(ast.parse(override), override, {"A": {"root"}}) == []


def test_twin_gate_counts_statements_and_ignores_docstrings():
    first = ast.parse("def f(x):\n    '''One.'''\n" + "    x += 1\n" * MIN_TWIN_STATEMENTS)
    second = ast.parse("def g(x):\n    '''Two.'''\n" + "    x += 1\n" * MIN_TWIN_STATEMENTS)
    short = ast.parse("def f(x):\n    return x\ndef g(x):\n    return x\n")

    assert twins({"a": first, "b": second}) == [["a:f", "b:g"]]
    assert twins({"a": short}) == []
