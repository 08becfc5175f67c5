"""The docs say what the code says: generated pages are current, the worked example runs, links lead somewhere."""

import importlib.util
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open

from optimize.pipeline.contract import Kind, Target
from optimize.pipeline.workers import WorkerProcess
from tests.bad_input import CASES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "optimize.schema.json", "support.md"])
def test_a_generated_page_is_current(name: str, generate: ModuleType) -> None:
    assert (DOCS / name).read_text() == generate.PAGES[name](), "run `make docs`"


def test_the_table_of_messages_has_a_row_for_every_case(generate: ModuleType) -> None:
    table = (DOCS / "exit-codes.md").read_text().partition(generate.TABLE)[2].splitlines()
    cells = [line.split(" | ", 2) for line in table]
    assert [(given.removeprefix("| "), code) for given, code, _ in cells] == [
        (case.given, str(case.code)) for case in CASES
    ], "run `make docs`"


def test_the_worked_example_runs(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "writing-a-pass.md").read_text(), re.DOTALL)
    site, out = tmp_path / "site", tmp_path / "out"
    info = site / "stamps-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "stamp_checkpoint.py").write_text(example)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stamps\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[optimize.passes]\nstamp-checkpoint = stamp_checkpoint:StampCheckpoint\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    out.mkdir()
    target = Target("cpu", "a processor", "x86_64", (), ("float32",), 1, 1 << 30)
    source = {"kind": Kind.CHECKPOINT, "path": str(tiny), "key": "k", "digest": "d"}
    with WorkerProcess(tmp_path / "log") as worker:
        made = worker.ask(
            "build", limit=120, step="stamp-checkpoint{note=hello}", source=source, task="feature-extraction",
            target=asdict(target), calibration=None, out=str(out),
        )  # fmt: skip
    assert made["facts"] == {"files": 1}
    with safe_open(out / "model.safetensors", framework="np") as weights:
        assert weights.metadata()["note"] == "hello"
    assert "stamp_checkpoint" not in sys.modules, "passes run in workers"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
