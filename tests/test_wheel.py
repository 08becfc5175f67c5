"""What a wheel of this tree holds: the four folders under one import root, and nothing beside it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_package_and_its_data(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a build writes into its tree, and would find there what an earlier one left
    ignored = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, tree], check=True)
    (wheel,) = tmp_path.glob("optimize-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"optimize"}
    sources = {path.relative_to(ROOT).as_posix() for folder in ("pipeline", "passes", "targets", "models")
               for path in (ROOT / folder).rglob("*.py")}  # fmt: skip
    sources |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline" / "cards").rglob("*.txt")}
    assert {f"optimize/{source}" for source in sources} <= names
    assert {"optimize/__init__.py", "optimize/py.typed", "optimize/models/data/text.jsonl"} <= names
    assert any(name.endswith("LICENSE") for name in names)
