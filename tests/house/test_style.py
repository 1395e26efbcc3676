"""How the text is laid out: what ruff, clang-format and mypy do not look at."""

import ast
import re

import pytest

from helpers import ROOT, TESTS

FOLDERS = ("tdkern", "tests", "bench", "csrc", "docs", "examples", "cmake")
LENGTH = 60  # lines of a function, from `def` to the end
WIDTH = 100


def files(*suffixes):
    """The repository's own files."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += (ROOT / folder).rglob("*")
    return sorted(path for path in found if path.suffix in suffixes)


def long_functions(text):
    """(name, lines) of the functions longer than a screen, docstrings included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > LENGTH:
                yield node.name, lines


def long_lines(text):
    """The numbers of lines that are too long and could be broken: prose, not code in fences,
    tables, or a word, such as a link, that is too long itself."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        words = re.sub(r"^[-*>\d. ]+", "", line).split()
        is_code = fenced or line.startswith("    ")
        is_table = line.lstrip().startswith("|")
        if len(line) > WIDTH and not is_code and not is_table and len(words) > 1:
            yield number


def nested_conditionals(text):
    """The lines of conditional expressions within others."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.IfExp):
            inner = [each for each in ast.walk(node) if isinstance(each, ast.IfExp)]
            yield from (node.lineno for _ in inner[1:])


def nested_conditionals_of_c(text):
    """The parts of statements of C++ that have two conditional operators."""
    code = re.sub(r"//.*|\"[^\"\n]*\"", "", text)
    yield from (part for part in re.split(r"[,;{}]", code) if part.count("?") > 1)


def stranded_comments(text):
    """The lines that close a bracket and have a comment, which is about what was opened before."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r" *[])}].*(?<!,)  # (?!type: |noqa)", line):
            yield number


def imported_tests(text):
    """The test modules that a file imports."""
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if not names[0].startswith("helpers"):
                names += [alias.name for alias in node.names]
        yield from (name for name in names if re.search(r"(^|\.)test_\w+$", name))


def test_no_function_is_longer_than_a_screen():
    long = {
        f"{path.relative_to(ROOT)}: {name}": lines
        for path in files(".py")
        for name, lines in long_functions(path.read_text())
    }
    assert long == {}


def test_no_line_is_longer_than_the_others():
    """Python's lines are ruff's to judge, where nothing is excepted."""
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files(".md")
        for number in long_lines(path.read_text())
    ]
    assert long == []
    excepted = [
        str(path.relative_to(ROOT))
        for path in files(".py")
        if re.search(r"# noqa: *E501|# ruff: *noqa|# fmt: *off", path.read_text())
        and path.name != "test_style.py"
    ]
    assert excepted == []


def found_in(suffixes, look):
    """What a look finds, by file."""
    return {
        str(path.relative_to(ROOT)): found
        for path in files(*suffixes)
        if (found := list(look(path.read_text())))
    }


def test_no_conditional_is_within_another():
    assert found_in([".py"], nested_conditionals) == {}
    c = [".h", ".cuh", ".cpp", ".cu"]
    assert len(files(*c)) > 30
    assert found_in(c, nested_conditionals_of_c) == {}


def test_no_comment_stands_behind_a_closing_bracket():
    assert found_in([".py"], stranded_comments) == {}


def test_no_test_module_imports_another():
    imports = {
        str(path.relative_to(ROOT)): names
        for path in TESTS.rglob("*.py")
        if (names := list(imported_tests(path.read_text())))
    }
    assert imports == {}


def function(lines):
    return "def f():\n" + "    pass\n" * (lines - 1)


@pytest.mark.parametrize(
    "look, right, wrong",
    [
        (long_functions, function(LENGTH), function(LENGTH + 1)),
        (long_lines, "word " * 20, "word " * 21),
        (long_lines, "```\n" + "code " * 30 + "\n```", "```\n```\n" + "word " * 30),
        (long_lines, "| " + "cell | " * 30, "- " + "item " * 30),
        (long_lines, "- " + "x" * 200, "x" * 200 + " y"),
        (
            nested_conditionals,
            "a = b if c else d; e = f if g else h",
            "a = b if c else d if e else f",
        ),
        (nested_conditionals_of_c, "a = {b ? c : d, e ? f : g};", "a = b ? c\n : d ? e : f;"),
        (stranded_comments, "f(  # why\n    a,  # what\n)", "f(\n    a\n)  # why"),
        (imported_tests, "from helpers.cases import test_like", "from ops.test_td_loss import x"),
        (imported_tests, "import helpers.testing", "import test_td_loss"),
    ],
)
def test_the_looks_see_what_they_are_for(look, right, wrong):
    assert not list(look(right)) and list(look(wrong))


def test_the_readme_is_a_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    pictures = [ROOT / name for name in re.findall(r"!\[[^]]+\]\((docs/[^)]+)\)", text)]
    assert len(pictures) == 2 and all(picture.stat().st_size < 200_000 for picture in pictures)
    (table,) = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(table.splitlines()) == 2 + 6
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link
