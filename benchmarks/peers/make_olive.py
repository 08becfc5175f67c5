"""Olive: `olive optimize` for the CPU in float32 and int8, and its int8 passes on our calibration text.

`olive optimize --precision int8` downloads its calibration data from a hub and calibrates on CUDA. So that it needs
neither, its own configuration (`--dry_run`) is run again with those two things changed. Dynamic int8 is a pass that
`optimize` does not choose: it is run by itself.
"""

import json
from pathlib import Path

from record import Made, Recorder, ToolError, command, last_words

QUIET = "--disable_telemetry"


def main() -> None:
    recorder = Recorder("olive", "olive-ai", "torch", "transformers", "onnxruntime", "onnxscript")
    checkpoint = recorder.checkpoint.resolve()

    def words(precision: str) -> tuple[str, ...]:
        device = ("--device", "cpu", "--provider", "CPUExecutionProvider")
        exporter = ("--exporter", "dynamo_exporter", "--task", recorder.task, QUIET)
        return ("olive", "optimize", "--precision", precision, *device, *exporter)

    def static(folder: Path) -> Made:
        command(*words("int8"), "-m", checkpoint, "-o", ".", "--dry_run", folder=folder)
        config = json.loads((folder / "config.json").read_text())
        # its reader wants a label, which calibration does not use
        rows = (json.dumps({"text": text, "label": 0}) for text in recorder.calibration())
        (folder / "calibration.jsonl").write_text("\n".join(rows) + "\n")
        (data,) = config["data_configs"]
        data["load_dataset_config"] = {"data_name": "json", "data_files": "calibration.jsonl", "split": "train"}
        data["pre_process_data_config"]["input_cols"] = ["text"]
        config["passes"]["onnx_static_quantization"]["calibration_providers"] = ["CPUExecutionProvider"]
        (folder / "config.json").write_text(json.dumps(config))
        return made(folder, "olive", "run", "--config", "config.json", QUIET)

    plain = recorder.artifact(
        "olive", " ".join(words("fp32")), lambda folder: made(folder, *words("fp32"), "-m", checkpoint)
    )
    recorder.artifact(
        "olive-int8-cli", " ".join(words("int8")), lambda folder: made(folder, *words("int8"), "-m", checkpoint)
    )
    recorder.artifact("olive-int8-static", "olive run, as olive-int8-cli, on our calibration text", static)
    if plain is not None:
        one = ("olive", "run-pass", "--pass-name", "OnnxDynamicQuantization")
        recorder.artifact(
            "olive-int8-dynamic",
            f"{' '.join(one)}, of olive",
            lambda folder: made(folder, *one, "-m", plain.path.resolve(), QUIET),
        )
    recorder.done()


def made(folder: Path, *words: str | Path) -> Made:
    """Run Olive in `folder`, where its cache then lies too. It exits with 0 when it made nothing."""
    output = command(*words, "-o", "model", folder=folder)
    models = sorted((folder / "model").rglob("*.onnx"))
    if not models:
        raise ToolError(f"exit code 0, no model: {last_words(output)}")
    return Made(models[0], "onnxruntime")


if __name__ == "__main__":
    main()
