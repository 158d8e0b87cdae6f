"""The house rules: who imports whom, which packages, which folder runs alone, and how big everything is."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["gcn", "diffusion_rec", "gan", "story", "edit", "videoqa"]
PACKAGES = {"torch", "triton", "numpy", "PIL", "tqdm", "pytest"}
SOURCES = [p for top in [*MODELS, "kernels", "data", "tests"] for p in sorted((ROOT / top).rglob("*.py"))]
SOURCES.append(ROOT / "train.py")
SMALLER = {"videoqa": ", videos=40"}           # what two steps need no more of
OPTIONAL = {"h5py"}             # read only if it happens to be installed, with a sentence if not


def imports(path):
    """Top-level names of everything a file imports, function bodies included."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name.split(".")[0] for name in names)


def test_the_arrows_point_one_way():
    for path in SOURCES:
        top = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            if top in ("kernels", "data"):
                assert name not in {*MODELS, "train", "tests", {"kernels": "data", "data": "kernels"}[top]}, (
                    f"{path} imports {name}")
            if top in MODELS:
                assert name not in {*MODELS, "train", "tests"} - {top}, f"{path} imports {name}"


def test_only_the_six_packages_are_used():
    ours = {*MODELS, "kernels", "data", "tests", "train"}
    for path in SOURCES:
        for name in set(imports(path)) - ours - PACKAGES - OPTIONAL - {""}:
            assert name in sys.stdlib_module_names, f"{path} imports {name}"


def test_no_absolute_path_and_no_leftover():
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            where = f"{path.relative_to(ROOT)}:{number}"
            assert not re.search(r"""["'](/[a-z]{2,}){2,}""", line), f"{where} holds an absolute path"
            assert not re.search(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", line), f"{where} holds a leftover"
            assert "weights_only=" + "False" not in line and "allow_pickle=" + "True" not in line, where


def test_a_checkpoint_is_never_unpickled():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                arguments = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert arguments.get("weights_only") == "True", f"{path}:{node.lineno}"


@pytest.mark.parametrize("folder", [m for m in MODELS if (ROOT / m / "task.py").exists()])
def test_a_folder_runs_alone(folder, tmp_path):
    for part in (folder, "kernels", "data"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    script = (f"import torch; from {folder}.task import Config, Task\n"
              f"task = Task(Config(steps=2{SMALLER.get(folder, '')}), torch.device('cpu'))\n"
              "print([float(sum(task.update(batch, t).values())) for t, batch in enumerate(task.batches(0, 0, 2))])\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_sizes_are_printed(capsys):
    """Not a limit: `pytest -s` shows where the lines are."""
    with capsys.disabled():
        for top in [*MODELS, "kernels", "data", "tests", "train.py"]:
            files = [p for p in SOURCES if p.relative_to(ROOT).parts[0] == top]
            lines = sum(bool(line.strip()) for p in files for line in p.read_text().splitlines())
            if lines:
                print(f"\n{top:14}{len(files):3} files{lines:6} lines", end="")
    assert SOURCES
