"""What is imported when: planning and the command line load no ML framework, and imports run one way."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
FRAMEWORKS = frozenset(
    (
        "torch",
        "transformers",
        "onnx",
        "onnxruntime",
        "onnxruntime_genai",
        "onnxscript",
        "openvino",
        "nncf",
        "datasets",
        "accelerate",
        "torchao",
    )
)
ABOVE = {  # what a folder may not import at the top
    "pipeline": {"models", "passes", "targets"},
    "models": {"passes", "targets"},
    "passes": {"targets"},
    "targets": set[str](),
}
FILES = [path for folder in ABOVE for path in sorted((ROOT / folder).rglob("*.py"))]
PIPELINE = [path for path in FILES if path.is_relative_to(ROOT / "pipeline")]


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest folder that can be planned for."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    config = {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("[PAD]")
    weights = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
    save_file({"embeddings.word_embeddings.weight": weights}, folder / "model.safetensors")
    return folder


def command(*arguments: object) -> str:
    """Code that runs the command line and expects it to end well."""
    return f"""
import sys
from optimize.pipeline.cli import main
sys.argv = {["optimize", *map(str, arguments)]!r}
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
"""


def loaded(code: str, cwd: Path) -> set[str]:
    """Run code in a new interpreter: the frameworks that it had imported at its end."""
    tell = "\nimport sys; print('\\n' + ' '.join(name for name in sys.modules if '.' not in name))"
    done = subprocess.run(
        [sys.executable, "-c", code + tell], cwd=cwd, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.splitlines()[-1].split())
    assert "sys" in modules
    return modules & FRAMEWORKS


def test_the_check_sees_a_framework(tmp_path: Path) -> None:
    assert loaded("import onnx", tmp_path) >= {"onnx"}


@pytest.mark.parametrize(
    "code",
    [
        "import optimize; assert optimize.load and optimize.compile",
        command("--help"),
        command("compile", "--help"),
        command("passes"),
        command("targets"),
        command("cache", "list"),
    ],
    ids=["import", "--help", "compile --help", "passes", "targets", "cache list"],
)
def test_answers_without_a_framework(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIMIZE_CACHE", str(tmp_path / "cache"))
    assert loaded(code, tmp_path) == set()


@pytest.mark.parametrize("task", [None, "sentence-similarity", "text-classification"])
def test_plans_without_a_framework_and_writes_nothing(
    checkpoint_folder: Path, tmp_path: Path, task: str | None
) -> None:
    code = f"""
from pathlib import Path
from optimize.pipeline.driver import Request
request = Request({str(checkpoint_folder)!r}, task={task!r}, out=Path("out"), cache=Path("cache"))
planned = request.plan()
assert planned.plan.recipes and planned.plan.checkpoint.parameters == 128
assert planned.plan.describe(planned.store)
"""
    assert loaded(code, tmp_path) == set()
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_loads_no_framework_and_writes_nothing(checkpoint_folder: Path, tmp_path: Path) -> None:
    code = command(checkpoint_folder, "--dry-run", "--cache", "cache", "--recipe", "export-onnx,quantize-onnx")
    assert loaded(code, tmp_path) == set()
    assert list(tmp_path.iterdir()) == []


def at_the_top(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_the_top(node)


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """The dotted names that these nodes import."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    ("code", "top"),
    [
        ("import torch.nn", {"torch"}),
        ("try:\n    from onnx import load\nexcept ImportError:\n    pass", {"onnx"}),
        ("class A:\n    import nncf", {"nncf"}),
        ("def run():\n    import torch", set()),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", set()),
    ],
)
def test_the_check_tells_the_top_from_the_inside(code: str, top: set[str]) -> None:
    assert packages(imported(at_the_top(ast.parse(code)))) & FRAMEWORKS == top


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    names = imported(at_the_top(tree_of(path)))
    reached = {part[1] for part in (name.split(".") for name in names) if part[0] == "optimize" and len(part) > 1}
    assert not reached & ABOVE[folder]


@pytest.mark.parametrize("path", [path for path in FILES if "runtimes" not in path.parts], ids=name_of)
def test_no_framework_is_imported_at_the_top(path: Path) -> None:
    assert not packages(imported(at_the_top(tree_of(path)))) & FRAMEWORKS


@pytest.mark.parametrize("path", PIPELINE, ids=name_of)
def test_pipeline_imports_no_framework_at_all(path: Path) -> None:
    assert not packages(imported(ast.walk(tree_of(path)))) & FRAMEWORKS


def test_the_files_that_are_checked_are_there() -> None:
    assert {"worker.py", "cli.py", "recipe.py"} <= {path.name for path in PIPELINE}
    assert len(FILES) > len(PIPELINE) + 15
