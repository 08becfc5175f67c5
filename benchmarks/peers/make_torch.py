"""PyTorch as it comes: eager and torch.compile. Nothing is written; the server loads the checkpoint and compiles it."""

from record import Made, Recorder

BF16, COMPILE, FREEZING = {"dtype": "bfloat16"}, {"compile": {}}, {"freezing": True}

# name: options of the server, the same in words. The first is the baseline of all ratios; the second is its double,
# which must come out at 1
VARIANTS = {
    "eager-f32": ({}, "float32"),
    "eager-f32-again": ({}, "float32, in a second process: what the harness makes of equal sides"),
    "eager-bf16": (BF16, "from_pretrained(dtype=bfloat16)"),
    "compile-f32": (COMPILE, "torch.compile(model)"),
    "compile-f32-freezing": (COMPILE | FREEZING, "torch.compile(model), TORCHINDUCTOR_FREEZING=1"),
    "compile-bf16": (BF16 | COMPILE, "bfloat16, torch.compile(model)"),
    "compile-bf16-freezing": (BF16 | COMPILE | FREEZING, "bfloat16, torch.compile(model), TORCHINDUCTOR_FREEZING=1"),
}


def main() -> None:
    recorder = Recorder("torch", "torch", "transformers")
    for name, (options, settings) in VARIANTS.items():
        made = Made(recorder.checkpoint, "torch", options)
        recorder.artifact(name, settings, lambda folder, made=made: made)
    recorder.done()


if __name__ == "__main__":
    main()
