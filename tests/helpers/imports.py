"""What a GPU machine's own files import, and whether it has that (tests/site/sitecustomize.py)."""

import ast
import json
import sys
from pathlib import Path

from . import ROOT

SITE = ROOT / "tests/site"
sys.path.append(str(SITE))

import sitecustomize as site  # noqa: E402


def imported(file):
    """The packages that a file asks for, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def check_imports(log, needed):
    """That processes under the hook were refused nothing, loaded the files that are needed, and no
    file of theirs outside tdkern, whose extras are imported where they are used, names a package in
    any function that a GPU machine lacks.

    Args:
        log: of TDKERN_IMPORTS.
        needed: files, from the repository's root.
    """
    facts = [json.loads(line) for line in log.read_text().splitlines()]
    assert [fact for fact in facts if "refused" in fact] == []
    files = {Path(file) for fact in facts for file in fact.get("files", []) if file.endswith(".py")}
    assert [name for name in needed if ROOT / name not in files] == []
    ours = {file.stem for folder in ("bench", "bench/gpu") for file in (ROOT / folder).glob("*.py")}
    allowed = site.PACKAGES | site.STANDARD | ours | {"helpers", "tdkern"}
    theirs = [file for file in files if ROOT / "tdkern" not in file.parents]
    others = {file: imported(file) - allowed for file in theirs}
    assert {file: names for file, names in others.items() if names} == {}
