"""Bad input is refused in words, with its exit code, and leaves nothing behind. The cases are in tests/bad_input.py."""

from pathlib import Path

import pytest
import torch

from tests.bad_input import CASES, Case, Outcome, a_file, emitted, model, request, run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refuses(case: Case, tmp_path: Path) -> None:
    if "no GPU" in case.given and torch.cuda.is_available():
        pytest.skip("here is a GPU")
    outcome = run(case, tmp_path)
    assert case.says in outcome.stderr, outcome
    assert outcome.code == case.code, outcome
    assert "Traceback" not in outcome.stdout + outcome.stderr
    if case.json:
        assert outcome.error["exit_code"] == case.code and case.says in outcome.error["error"]
    assert_nothing_is_left(outcome)


def test_an_unknown_model_type_of_a_known_architecture_can_be_planned(tmp_path: Path) -> None:
    def planned(folder: Path) -> list[str]:
        return [*model(model_type="never-heard-of")(folder), "--dry-run"]

    outcome = run(Case("", "", planned, "", code=0, json=False), tmp_path)
    assert outcome.code == 0 and "BertModel" in outcome.stdout
    assert_nothing_is_left(outcome)


def test_verify_writes_its_refusal(tmp_path: Path) -> None:
    case = Case("", "", emitted(None), "was not emitted")
    assert run(case, tmp_path).error["exit_code"] == 2


def test_a_json_file_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    def make(folder: Path) -> list[str]:
        return request(folder, json=a_file(folder) + "/report.json")

    outcome = run(Case("", "", make, "", json=False), tmp_path)
    assert outcome.code == 2 and "report.json cannot be written" in outcome.stderr


def test_every_case_has_a_name_and_words_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len({case.given for case in CASES}) == len(CASES)


def assert_nothing_is_left(outcome: Outcome) -> None:
    assert not outcome.changed and not outcome.unfinished, outcome
