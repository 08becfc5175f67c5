"""Ours: `optimize` at two gates, and what it emits opened with its bare runtime as its model card says."""

import json
import shutil
from pathlib import Path

from record import Made, Recorder, ToolError, command

# kind: the server's runtime, the file that it opens
RUNTIMES = {
    "checkpoint": ("torch", "."),
    "aoti": ("aoti", "model.pt2"),
    "onnx": ("onnxruntime", "model.onnx"),
    "openvino": ("openvino", "openvino_model.xml"),
}
GATES = ("0.001", "0.005")
CACHE = Path("out/peers/cache")


def main() -> None:
    recorder = Recorder("optimize", "optimize", "torch", "transformers", "onnxruntime", "openvino", "nncf")
    for gate in GATES:
        recorder.artifact(
            f"ours-{gate}",
            " ".join(["optimize", "--max-drop", gate, *recorder.ours]),
            lambda folder, gate=gate: emitted(recorder, gate, folder),
        )
    recorder.done()


def emitted(recorder: Recorder, gate: str, folder: Path) -> Made:
    """Run the product as a user would. Raises ToolError when nothing passes the gate."""
    shutil.rmtree(folder)  # the product makes it
    data = ("--task", recorder.task, "--data", recorder.data) if recorder.data else ()
    report = folder.parent / f"{folder.name}.json"
    where = ("--out", folder, "--cache", CACHE, "--json", report)
    try:
        command("optimize", recorder.checkpoint, *data, "--max-drop", gate, *where, *recorder.ours)
    except ToolError as error:
        reasons = [f"{each['name']}: {each['reason']}" for each in json.loads(report.read_text())["candidates"]]
        raise ToolError(f"{str(error).partition(':')[0]}: {'; '.join(reasons)}") from error
    manifest = json.loads((folder / "optimize.json").read_text())
    runtime, file = RUNTIMES[manifest["kind"]]
    options = {"dtype": "auto"} if runtime == "torch" else {}
    if runtime == "openvino":
        options["properties"] = json.loads((folder / "runtime.json").read_text())
    return Made(folder / file, runtime, options, f": {manifest['recipe']}")


if __name__ == "__main__":
    main()
