"""What an artifact carries of the one that it is made of."""

import dataclasses
from pathlib import Path

from optimize.passes._links import link_checkpoint
from optimize.passes.compile_generate import CompileGenerate
from optimize.pipeline.contract import Artifact, Context, Kind
from optimize.targets import cpu
from tests.conftest import MakeCheckpoint


def test_a_users_files_are_copied_and_the_stores_linked_and_nothing_else_is_carried(tiny: Path, tmp_path: Path) -> None:
    given, stored, own = tmp_path / "given", tmp_path / "stored", Artifact(Kind.CHECKPOINT, tmp_path / "own", "k", "k")
    own.path.mkdir()
    for path in tiny.iterdir():
        (own.path / path.name).write_bytes(path.read_bytes())
    for name in ("pytorch_model.bin", "notes.py", "training_args.bin"):
        (own.path / name).write_text("what nobody asked for")
    given.mkdir()
    stored.mkdir()
    link_checkpoint(own, given)
    assert {path.name for path in given.iterdir()} == {path.name for path in tiny.iterdir()}
    link_checkpoint(dataclasses.replace(own, digest="d"), stored)
    for folder, same in ((given, False), (stored, True)):
        for path in folder.iterdir():
            assert path.samefile(own.path / path.name) is same


def test_a_file_that_is_changed_is_not_the_sources(make_language_model: MakeCheckpoint, tmp_path: Path) -> None:
    model, out = make_language_model(), tmp_path / "out"
    before = (model / "generation_config.json").read_bytes()
    out.mkdir()
    CompileGenerate().run(Artifact(Kind.CHECKPOINT, model, "k", "d"), Context("text-generation", cpu.probe()), out)
    assert (model / "generation_config.json").read_bytes() == before
    assert b'"static"' in (out / "generation_config.json").read_bytes()
    assert (out / "model.safetensors").samefile(model / "model.safetensors")
