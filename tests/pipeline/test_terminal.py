"""What commands share: a report never takes the place of what it is about."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from optimize.pipeline import terminal
from optimize.pipeline.cli import main_group
from optimize.pipeline.errors import RequestError


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (("verify", "folder"), "folder/optimize.json"),
        (("explain", "folder"), "folder/report.json"),
        (("compile", "folder"), "folder/model.safetensors"),
        (("compile", "folder", "--dry-run"), "folder/deep/new.json"),
        (("compile", "missing", "--data", "data.jsonl"), "data.jsonl"),
    ],
)
def test_what_is_read_is_not_written_over(
    arguments: tuple[str, ...], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("folder/optimize.json", "folder/report.json", "folder/model.safetensors", "data.jsonl"):
        (tmp_path / name).write_text("theirs")
    result = CliRunner().invoke(main_group, [*arguments, "--json", file])
    assert isinstance(result.exception, RequestError), result
    assert "would be written over what is read" in str(result.exception)
    left = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(left) == 4 and set(left.values()) == {"theirs"}


@pytest.mark.parametrize("older", [True, False])
def test_an_unfinished_report_stays_and_an_older_one_is_replaced(tmp_path: Path, older: bool) -> None:
    path = tmp_path / "report.json"
    if older:
        path.write_text("of an earlier run")
    with pytest.raises(RequestError), terminal.errors_to(path):
        raise RequestError("refused")
    assert json.loads(path.read_text()) == {"exit_code": 2, "error": "refused"}
    with pytest.raises(KeyboardInterrupt), terminal.errors_to(path):
        path.write_text("what was found out until then")
        raise KeyboardInterrupt
    assert path.read_text() == "what was found out until then"
