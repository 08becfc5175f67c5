"""optimum-cli with ONNX Runtime: export, its optimization levels, and dynamic int8."""

from pathlib import Path

from record import Made, Recorder, command


def main() -> None:
    recorder = Recorder("optimum-onnx", "optimum-onnx", "optimum", "torch", "transformers", "onnxruntime")
    words = ("--task", recorder.task, "--library", "transformers")

    def export(folder: Path, *more: str) -> Made:
        command("optimum-cli", "export", "onnx", "--model", recorder.checkpoint, *words, *more, folder)
        return Made(folder / "model.onnx", "onnxruntime")

    def quantize(folder: Path, source: Path) -> Made:
        options = ("--avx512_vnni", "--per_channel")
        command("optimum-cli", "onnxruntime", "quantize", "--onnx_model", source, *options, "-o", folder)
        return Made(folder / "model_quantized.onnx", "onnxruntime")

    called = f"optimum-cli export onnx {' '.join(words)}"
    plain = recorder.artifact("optimum-onnx", called, export)
    for level in ("O2", "O3", "O4"):
        recorder.artifact(
            f"optimum-onnx-{level}",
            f"{called} --optimize {level}",
            lambda folder, level=level: export(folder, "--optimize", level),
        )
    if plain is not None:
        recorder.artifact(
            "optimum-onnx-int8",
            "optimum-cli onnxruntime quantize --avx512_vnni --per_channel, of optimum-onnx (dynamic)",
            lambda folder: quantize(folder, plain.path.parent),
        )
    recorder.done()


if __name__ == "__main__":
    main()
