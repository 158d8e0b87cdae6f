"""READMEs point at real code: `file.py:first-last symbol` must be exactly that symbol.

`python -m tests.test_docs` rewrites the line numbers after an edit.
"""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
POINTER = re.compile(r"`([\w/]+\.py):(\d+)-(\d+) ([\w.]+)`")
READMES = sorted(p for p in ROOT.rglob("README.md") if "runs" not in p.parts and not any(x.startswith(".") for x in p.parts))


def documented(tree, prefix=""):
    """(node, dotted name) of every class, function and method."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node, prefix + node.name
            yield from documented(node, prefix + node.name + ".")


def symbols(path):
    """{dotted name: (first line, last line)} of every class, function and method; decorators belong to them."""
    return {name: (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno)
            for node, name in documented(ast.parse(path.read_text()))}


def broken(readme):
    """-> (text with right numbers, list of complaints)"""
    complaints = []

    def fix(match):
        file, first, last, name = match.groups()
        if not (ROOT / file).exists():
            complaints.append(f"{readme}: {file} does not exist")
            return match[0]
        lines = symbols(ROOT / file).get(name)
        if lines is None:
            complaints.append(f"{readme}: {file} has no {name}")
            return match[0]
        if lines != (int(first), int(last)):
            complaints.append(f"{readme}: {name} is {file}:{lines[0]}-{lines[1]}; run python -m tests.test_docs")
        return f"`{file}:{lines[0]}-{lines[1]} {name}`"

    return POINTER.sub(fix, readme.read_text()), complaints


@pytest.mark.parametrize("readme", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_readme_pointers_are_true(readme):
    assert not broken(readme)[1]


@pytest.mark.parametrize("readme", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_equations_named_in_a_readme_row_are_named_in_the_code(readme):
    for line in readme.read_text().splitlines():
        pointer, equations = POINTER.search(line), re.findall(r"Eqs?\. ?([\d]+(?:-[\d]+)?)",
                                                              line.split("|")[1] if "|" in line else "")
        if pointer and equations and line.startswith("|"):
            file, _, _, name = pointer.groups()
            first, last = symbols(ROOT / file)[name]
            source = "\n".join((ROOT / file).read_text().splitlines()[first - 1 : last])
            for equation in equations:
                assert re.search(rf"Eqs?\. ?[\d, -]*\b{equation.split('-')[0]}\b", source), (
                    f"{name} in {file} does not name Eq. {equation}")


@pytest.mark.parametrize("readme", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_equations_named_in_indexed_code_are_in_the_index(readme):
    rows = [line for line in readme.read_text().splitlines() if line.startswith("|") and POINTER.search(line)]
    indexed = {(m[1], m[4]) for line in rows for m in POINTER.finditer(line)}
    for file in {file for file, _ in indexed}:
        for node, name in documented(ast.parse((ROOT / file).read_text())):
            if re.search(r"\b(Eqs?|Fig)\. ?\d", ast.get_docstring(node) or ""):
                assert (file, name) in indexed, f"{readme} has no row for {name} in {file}, which names an equation"


def test_readme_links_lead_somewhere():
    for readme in READMES:
        for target in re.findall(r"\]\(([^)#:\s]+)\)", readme.read_text()):
            assert (readme.parent / target).exists(), f"{readme} links to {target}"


if __name__ == "__main__":
    for path in READMES:
        text, complaints = broken(path)
        path.write_text(text)
        print(*complaints, sep="\n", file=sys.stderr)
