"""optimize.json: the schema that it has, and what is said of a file that is not one."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from optimize.pipeline.contract import Kind, LabelKind, Labelling
from optimize.pipeline.errors import ArtifactError, ExitCode
from optimize.pipeline.manifest import (
    FILE,
    Manifest,
    Report,
    ToolchainFacts,
    read_manifest,
    schema,
    to_json,
)
from optimize.pipeline.usage import install, usage

DOCUMENT = Path(__file__).parents[2] / "docs" / "optimize.schema.json"


@pytest.fixture
def read(tmp_path: Path) -> Callable[[object], Manifest]:
    """Read a folder whose optimize.json holds this text, or this value as JSON."""

    def of(content: object) -> Manifest:
        (tmp_path / FILE).write_text(content if isinstance(content, str) else json.dumps(content))
        return read_manifest(tmp_path)

    return of


@pytest.fixture
def document(manifest: Manifest) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(to_json(manifest))
    return content


def paths(value: object, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each field of each object in a document."""
    found = []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += [(*prefix, name), *paths(inner, (*prefix, name))]
    elif isinstance(value, list) and value:
        found += paths(value[0], (*prefix, 0))
    return found


def without(document: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    inner: Any = changed
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return changed


def test_what_is_written_is_read_back(manifest: Manifest, read: Callable[[object], Manifest]) -> None:
    assert read(to_json(manifest)) == manifest


@pytest.mark.parametrize(
    ("kind", "labels"),
    [(LabelKind.CLASS, (0, 2)), (LabelKind.SCORE, (1.0, 2.5)), (LabelKind.SCORE, (1.0, 2.0)),
     (LabelKind.TAGS, ((0, 1), (2,))), (LabelKind.ANSWERS, (("Ann", "1"), ())), (LabelKind.ANSWERS, ((), ("1",))),
     (LabelKind.ANSWERS, (("3",), ("4",)))],
)  # fmt: skip
def test_labels_of_every_kind_are_read_back(
    kind: LabelKind, labels: Any, manifest: Manifest, read: Callable[[object], Manifest]
) -> None:
    labelling = Labelling(kind, labels, {0: "O", 7: "B-PER"})
    evaluation = dataclasses.replace(manifest.report.evaluation, labelling=labelling)
    report = dataclasses.replace(manifest.report, evaluation=evaluation)
    text = to_json(dataclasses.replace(manifest, report=report))
    jsonschema.validate(json.loads(text), schema(), jsonschema.Draft202012Validator)
    found = read(text).report.evaluation
    assert found == evaluation and repr(found.labelling) == repr(labelling)


@pytest.mark.parametrize("labels", [["Ann"], [[0], ["Ann"]], [[0.5]], 3])
def test_other_labels_are_refused(labels: Any, document: dict[str, Any], read: Callable[[object], Manifest]) -> None:
    document["report"]["evaluation"]["labelling"]["labels"] = labels
    with pytest.raises(ArtifactError, match="is not a valid manifest"):
        read(document)


def test_a_manifest_is_valid_by_its_schema(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(document, schema(), jsonschema.Draft202012Validator)


def test_schema_and_reader_refuse_the_same_missing_fields(
    document: dict[str, Any], read: Callable[[object], Manifest]
) -> None:
    validator = jsonschema.Draft202012Validator(schema())
    refused = set()
    for path in paths(document):
        broken = without(document, path)
        valid = validator.is_valid(broken)
        try:
            read(broken)
        except ArtifactError:
            assert not valid, path
            refused.add(path)
        else:
            assert valid, path
    assert refused >= {
        (field.name,) if kind is Manifest else ("report", field.name)
        for kind in (Manifest, Report)
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING
    }
    assert ("accuracy", "drop", "high") in refused
    assert ("report", "host", "target", "features") in refused


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "no-kind"), ("files", ["model.onnx"]), ("accuracy", None), ("speed", "fast"), ("recipe", 3)],
)
def test_schema_and_reader_refuse_a_wrong_type(
    document: dict[str, Any], read: Callable[[object], Manifest], field: str, value: object
) -> None:
    broken = document | {field: value}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema())
    with pytest.raises(ArtifactError, match=f"is not a valid manifest: {field}"):
        read(broken)


@pytest.mark.skipif(not DOCUMENT.exists(), reason="docs/optimize.schema.json is not generated yet")
def test_the_documented_schema_is_the_real_one() -> None:
    assert json.loads(DOCUMENT.read_text()) == schema()


def test_a_folder_near_what_was_emitted_names_it(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "more" / "two"
    for each in (one, two):
        (each / "evidence").mkdir(parents=True)
        (each / FILE).write_text("{}")
    for folder, hint in ((tmp_path, f"one lies in {two}, {one}"), (one / "evidence", f"one lies in {one}")):
        with pytest.raises(ArtifactError, match=r"has no optimize\.json") as raised:
            read_manifest(folder)
        assert raised.value.hint == hint


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no optimize\.json: it was not emitted by optimize") as raised:
        read_manifest(tmp_path)
    assert raised.value.exit_code == ExitCode.REFUSED


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path / "file")


@pytest.mark.parametrize("content", ["", "not json", '{"schema_version": "1.0"', "\x00\x01"])
def test_what_is_not_json(read: Callable[[object], Manifest], content: str) -> None:
    with pytest.raises(ArtifactError, match="is not a valid manifest: JSONDecodeError"):
        read(content)


@pytest.mark.parametrize("content", [[], {}, None, "text", 3])
def test_json_of_another_thing(read: Callable[[object], Manifest], content: object) -> None:
    with pytest.raises(ArtifactError, match="is not a valid manifest"):
        read(json.dumps(content))


def test_a_missing_field_is_named(document: dict[str, Any], read: Callable[[object], Manifest]) -> None:
    with pytest.raises(ArtifactError, match=r"is not a valid manifest: report\.checkpoint\.files: Field required"):
        read(without(document, ("report", "checkpoint", "files")))


@pytest.mark.parametrize("version", ["0.9", "1.2", "10.0"])
def test_another_major_version_is_refused(
    document: dict[str, Any], read: Callable[[object], Manifest], version: str
) -> None:
    with pytest.raises(ArtifactError, match=f"has schema version {version}, this optimize reads 2") as raised:
        read(document | {"schema_version": version})
    assert raised.value.hint is not None


def test_another_major_version_with_other_fields_is_refused_as_that(
    document: dict[str, Any], read: Callable[[object], Manifest]
) -> None:
    with pytest.raises(ArtifactError, match=r"has schema version 3\.0"):
        read(without(document, ("accuracy",)) | {"schema_version": "3.0", "proofs": []})


def test_a_newer_minor_version_with_an_added_field_is_read(
    document: dict[str, Any], manifest: Manifest, read: Callable[[object], Manifest]
) -> None:
    newer = document | {"schema_version": "2.9", "added": {"later": True}}
    assert jsonschema.Draft202012Validator(schema()).is_valid(newer)
    assert read(newer) == dataclasses.replace(manifest, schema_version="2.9")


def test_a_report_names_what_it_ran_with(manifest: Manifest) -> None:
    packages = manifest.report.host.packages
    assert packages["optimize"]
    assert packages.keys() >= {"torch", "transformers", "numpy"}
    assert None not in packages.values()


@pytest.mark.parametrize("task", ["text-generation", "feature-extraction"])
def test_a_checkpoint_that_was_proved_on_a_gpu_is_run_there(manifest: Manifest, task: str) -> None:
    source = dataclasses.replace(manifest.report.checkpoint, task=task)
    target = dataclasses.replace(manifest.report.host.target, gpus=1)
    packages = {"transformers": "5.17.0", "torch": "2.11.0+cu130", "bitsandbytes": "0.50.2", "accelerate": "1.15.0"}
    host = dataclasses.replace(manifest.report.host, target=target, packages=packages)
    report = dataclasses.replace(manifest.report, checkpoint=source, host=host)
    for recipe, moved in (("cast-dtype", True), ("quantize-bitsandbytes", False)):  # transformers moves that one
        lines = usage(report, Kind.CHECKPOINT, recipe)
        compile(lines, "card", "exec")
        assert (".cuda()" in lines) is moved and ".to(model.device)" in lines
        assert "cuda" not in usage(manifest.report, Kind.CHECKPOINT, recipe)
    assert install(report, Kind.CHECKPOINT, "quantize-bitsandbytes{mode=nf4}").split()[2:] == [
        "transformers==5.17.0", "torch==2.11.0", "bitsandbytes==0.50.2", "accelerate==1.15.0",
    ]  # fmt: skip


GENERATING = (Kind.GGUF, Kind.OLLAMA, Kind.GENAI, Kind.TENSORRT_LLM, Kind.VLLM, Kind.TENSOR_PARALLEL)
BOTH = (Kind.CHECKPOINT, Kind.OPENVINO, Kind.CUDA_GRAPHS)


@pytest.mark.parametrize(
    ("kind", "generates"),
    [*((kind, kind in GENERATING) for kind in Kind), *((kind, True) for kind in BOTH)],
)
def test_every_kind_has_lines_that_run_it_and_a_command_that_installs_it(
    manifest: Manifest, kind: Kind, generates: bool
) -> None:
    task = "text-generation" if generates else "feature-extraction"
    apart = {kind.toolchain: ToolchainFacts("3.12.1", "d" * 64, True, {"tensorrt": "10.1", "tensorrt-llm": "1.2.1"})}
    host = dataclasses.replace(manifest.report.host, toolchains=apart)
    source = dataclasses.replace(manifest.report.checkpoint, task=task)
    report = dataclasses.replace(manifest.report, checkpoint=source, host=host)
    for recipe in ("export-onnx,use-provider{provider=tensorrt-rtx}", "export-onnx"):
        lines = usage(report, kind, recipe)
        compile(lines, "card", "exec")
        assert "{{" not in lines
    command = install(report, kind, "export-onnx")
    assert command.startswith("pip install ")
    if kind in (Kind.TENSORRT, Kind.TENSORRT_LLM):
        assert f"{kind}==1" in command  # no registry has it: in the version that it was proved with
