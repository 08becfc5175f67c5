"""optimum-cli with OpenVINO: export, weight-only int8, and static int8.

Static int8 is `--quant-mode int8 --dataset wikitext2` on the command line, which downloads the data set from a hub. So
that it needs none, the same default configuration is run through the tool's Python interface on our calibration text,
which is of the kind that the model is judged on.
"""

import os
from pathlib import Path

from record import Made, Recorder, command

IR = "openvino_model.xml"
# what its OVModel classes compile with; they leave the precision to OpenVINO, which takes bf16 where the processor can
AS_IT_COMES = {"properties": {"PERFORMANCE_HINT": "LATENCY"}}
FLOAT32 = {"properties": {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}}


def main() -> None:
    recorder = Recorder("optimum-intel", "optimum-intel", "optimum", "torch", "transformers", "openvino", "nncf")
    words = ("--task", recorder.task, "--library", "transformers")
    called = f"optimum-cli export openvino {' '.join(words)}"

    def export(folder: Path, *more: str) -> Made:
        command("optimum-cli", "export", "openvino", "--model", recorder.checkpoint, *words, *more, folder)
        return Made(folder / IR, "openvino", AS_IT_COMES)

    plain = recorder.artifact("optimum-intel", called, export)
    if plain is not None:
        hinted = f"{called}, opened with INFERENCE_PRECISION_HINT=f32"
        recorder.artifact("optimum-intel-f32", hinted, lambda folder: Made(plain.path, "openvino", FLOAT32))
    weights = ("--weight-format", "int8")
    recorder.artifact("optimum-intel-int8-weights", f"{called} {' '.join(weights)}", lambda f: export(f, *weights))
    static = ("--quant-mode", "int8", "--dataset", "wikitext2")
    recorder.artifact("optimum-intel-int8-cli", f"{called} {' '.join(static)}", lambda f: export(f, *static))
    if plain is not None:
        recorder.artifact(
            "optimum-intel-int8",
            "OVQuantizer.quantize with OVQuantizationConfig(), on our calibration text",
            lambda folder: quantize(recorder, plain.path.parent, folder),
        )
    recorder.done()


def quantize(recorder: Recorder, source: Path, folder: Path) -> Made:
    """Weights and activations, with the tool's default configuration."""
    import datasets
    from optimum import intel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recorder.checkpoint)
    rows = [dict(tokenizer(text, truncation=True, max_length=512)) for text in recorder.calibration()]
    opened = {
        "feature-extraction": intel.OVModelForFeatureExtraction,
        "text-classification": intel.OVModelForSequenceClassification,
    }[recorder.task].from_pretrained(source)
    quantizer = intel.OVQuantizer.from_pretrained(opened)
    config = intel.OVConfig(quantization_config=intel.OVQuantizationConfig())
    data = datasets.Dataset.from_list(rows)
    quantizer.quantize(calibration_dataset=data, ov_config=config, save_directory=folder)
    return Made(folder / IR, "openvino", AS_IT_COMES)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
