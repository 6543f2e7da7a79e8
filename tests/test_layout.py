"""The shape of the house, held by tests: who may import whom, how large a file may grow, what the README
says."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minicot"
SCRIPTS = ("train.py", "sample.py", "align.py")

# module -> modules of the package that it may import (a mechanism knows the ones below it, never the reverse)
MAY_IMPORT = {
    "errors": set(),
    "parallel": {"errors"},
    "config": {"errors", "parallel"},
    "losses": set(),
    "model": set(),
    "tokenizer": {"errors"},
    "answers": {"errors"},
    "plots": set(),
    "vision": {"model"},
    "families": {"errors", "model", "vision"},
    "weights": {"errors", "model", "vision", "families"},
    "images": {"errors"},
    "toy": {"errors", "answers", "records"},
    "records": {"errors", "images"},
    "sets": {"errors", "records", "answers", "toy"},
    "data": {"errors", "records", "tokenizer", "answers", "images", "toy"},
    "scoring": {"model", "vision", "losses", "data"},
    "sampling": {"errors", "model", "vision", "tokenizer", "answers", "records", "data", "parallel"},
    "verifier": {"errors", "model", "vision", "tokenizer", "answers", "records", "data", "losses", "scoring"},
    "selection": {"data", "errors", "records", "scoring", "verifier"},
    "pruner": {"answers", "config", "data", "errors", "parallel", "records", "runs", "sampling", "scoring"}
    | {"selection", "sets", "tokenizer", "training", "verifier", "weights"},
    "synthesis": {"errors", "answers", "records", "data", "sampling", "chat"},
    "mme_cot": {"chat", "config", "errors", "records"},
    "metrics": {"answers"},
    "view": {"answers", "data", "errors", "metrics", "toy", "verifier"},
    "chat": {"errors"},
    "training": {"errors", "parallel"},
    "runs": {"config", "errors", "parallel", "tokenizer", "training", "weights"},
    "rewards": {"losses"},
    "rollouts": {"answers", "config", "data", "errors", "parallel", "rewards", "sampling", "scoring"}
    | {"training"},
    "evaluation": {"data", "losses", "metrics", "parallel", "runs", "sampling", "scoring", "sets"}
    | {"training", "weights"},
}
RECIPES = ("aft", "llava_reasoner", "llava_verifier", "llava_diagnose", "mme_cot", "ursa", "ursa_grpo")
RECIPES += ("ursa_labels", "ursa_text", "cot_max", "cot_max_text", "grpo")
BUDGETS = {
    "losses.py": 260,
    "model.py": 260,
    "view.py": 150,
    "pruner.py": 375,
    "selection.py": 175,
    "recipes/experiment.py": 281,
    "recipes/tables.py": 140,
    "recipes/work.py": 72,
    **{f"recipes/{name}.py": 110 for name in RECIPES},
    "recipes/llava_verifier.py": 124,
    "recipes/llava_diagnose.py": 112,
    "recipes/ursa_labels.py": 153,
}


def statements(path):
    """Statements of a file: docstrings, comments and blank lines don't count."""
    tree = ast.parse(path.read_text())
    docstrings = sum(
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for node in ast.walk(tree)
    )
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - docstrings


def imported(path):
    """Names of minicot modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minicot":
            found |= (
                {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
            )
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("minicot.")}
    return found


def sources(folder):
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def test_imports_go_only_where_the_table_allows():
    for path in sources(PACKAGE):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] in ("recipes", "__init__"):
            continue
        extra = imported(path) - MAY_IMPORT[parts[0]] - ({parts[0]} if len(parts) > 1 else set())
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_package_never_imports_a_script_or_a_peer():
    for path in sources(PACKAGE):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (transformers|trl|train|sample|align)\b", text, re.M), path


def test_a_recipe_is_a_declaration():
    """Arguments, threads, processes, packing and Markdown are the engine's."""
    engine = {"__init__.py", "experiment.py", "tables.py", "work.py"}
    recipes = [path for path in sources(PACKAGE / "recipes") if path.name not in engine]
    assert {path.stem for path in recipes} <= {Path(name).stem for name in BUDGETS}
    for path in recipes:
        assert not re.search(r"argparse|threading|concurrent|subprocess|\bhex\b|\|---", path.read_text()), (
            path
        )


def test_files_stay_within_their_budgets():
    for name, budget in BUDGETS.items():
        assert statements(PACKAGE / name) <= budget, (name, statements(PACKAGE / name))
    toy, recipes, mme_cot = (PACKAGE / name for name in ("toy", "recipes", "mme_cot"))
    apart = {toy, recipes, mme_cot, PACKAGE / "pruner.py", PACKAGE / "selection.py"}
    core = [path for path in sources(PACKAGE) if not apart & {path, *path.parents}]
    total = sum(map(statements, core)) + sum(
        statements(ROOT / name) for name in SCRIPTS if (ROOT / name).exists()
    )
    assert total <= 5170, total
    assert sum(map(statements, sources(mme_cot))) <= 690
    assert sum(map(statements, sources(toy))) <= 1225
    assert sum(map(statements, sources(recipes))) <= 1610


def test_the_template_can_be_read():
    assert len((PACKAGE / "view.html").read_text().splitlines()) <= 300


def test_lines_fit_in_a_window():
    files = [
        *sources(PACKAGE),
        *sources(ROOT / "tests"),
        *(ROOT / name for name in SCRIPTS if (ROOT / name).exists()),
    ]
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{path.relative_to(ROOT)}:{number} has {len(line)} columns"


@pytest.mark.parametrize("check", [("format", "--check"), ("check",)], ids=" ".join)
def test_one_formatting_throughout(check):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *check, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_unpickles():
    for path in [*sources(PACKAGE), *(ROOT / name for name in SCRIPTS if (ROOT / name).exists())]:
        assert not re.search(r"\bpickle\b|torch\.load\(|torch\.save\(", path.read_text()), path


def test_every_file_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`((?:minicot|tests)/[\w/.-]+|[\w]+\.py)`", text))
    assert named
    for name in named:
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), f"README names {name}"


def test_python_can_import_every_module():
    import importlib

    for path in sources(PACKAGE):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        importlib.import_module(name)
    assert "minicot" in sys.modules
