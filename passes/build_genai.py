"""build-genai: an ONNX graph with its cache and tokenizer, as ONNX Runtime GenAI's own builder makes them."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.checkpoint import read_config
from optimize.passes._gguf_families import rope
from optimize.passes._onnx import GRAPH, read_graph
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS

SETTINGS = "genai_config.json"
WHOLE = {"int8": {8}, "int4": {4, 8}}  # precision -> bits that a product by weights may have
# architecture -> rotary positions that the builder was seen to get right: of others it forgets some without a word
ROPES = {
    "GemmaForCausalLM": ("default", "linear"),
    "Gemma2ForCausalLM": ("default", "linear"),
    "GraniteForCausalLM": ("default", "linear"),
    "HunYuanDenseV1ForCausalLM": ("default", "dynamic"),
    "Lfm2ForCausalLM": ("default", "linear"),
    "LlamaForCausalLM": ("default", "llama3"),
    "MistralForCausalLM": ("default", "linear"),
    "NemotronForCausalLM": ("default", "llama3"),
    "PhiForCausalLM": ("default", "linear"),
    "Phi3ForCausalLM": ("default",),
    "Qwen2ForCausalLM": ("default", "linear"),
    "Qwen3ForCausalLM": ("default", "linear"),
    "SmolLM3ForCausalLM": ("default", "llama3"),
}
BLIND = ("MistralForCausalLM", "Phi3ForCausalLM")  # to a sliding window: their configs do not list it by layer


@dataclass(frozen=True)
class BuildGenai(Pass):
    """Build an ONNX Runtime GenAI folder with its builder: the model, its tokenizer and its settings.

    Whole numbers are those of MatMulNBits: `group` weights along the input share a float32 scale.

    With int4, weights have a zero point, and what picks the next token has eight bits; with `mixed`, so have the
    products that lose most, in the first and last eighth of the layers and every third between: llama.cpp's choice.
    Embeddings stay in float32, but for int4 where they are also what picks the next token.
    `activations` is what inputs of such products are rounded to, each group by its own scale.
    Raises RuntimeError where a product by weights was left out.
    Source: https://onnxruntime.ai/docs/genai/howto/build-model.html, onnxruntime_genai.models.builder
    """

    name: ClassVar = "build-genai"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.GENAI
    version: ClassVar = 1
    tools: ClassVar = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers")

    precision: Literal["fp32", "int8", "int4"] = "fp32"
    group: Literal[16, 32, 64, 128] = 32
    mixed: bool = True
    activations: Literal["int8", "fp32"] = "int8"

    @property
    def arithmetic(self) -> str | None:
        return "float32" if "fp32" in (self.precision, self.activations) else "int8"

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        config = read_config(checkpoint.folder)
        known = ROPES.get(checkpoint.architecture)
        if known is None:
            return f"{checkpoint.architecture} is none of those that it is known to build: {', '.join(ROPES)}"
        kind = rope(config)["rope_type"]
        if kind not in known:
            return f"rotary positions of type {kind} are not built right for {checkpoint.architecture}"
        window = config.get("sliding_window") or checkpoint.max_length
        if checkpoint.architecture in BLIND and window < checkpoint.max_length:
            return f"its sliding window of {window} tokens would be forgotten"
        return None

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS + int(4.2 * 4 * checkpoint.parameters)

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        from onnxruntime_genai.models import builder
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
        with tempfile.TemporaryDirectory() as scratch:
            cache = str(Path(scratch) / "cache")
            given: tuple[Any, ...] = (None, str(source.path), str(out), self.precision, "cpu", cache)
            options = builder.parse_extra_options(*given, self._options(config))
            builder.create_model(*given, **options)
        return {"products": dict(_products(out))}

    def _options(self, config: Any) -> list[str]:
        """The builder's options for a checkpoint with that config, as transformers reads it."""
        # a bounded cache for layers with a sliding window fails on prompts that are longer than the window
        found = ["hf_token=false", "windowed_kv_cache=false"]
        if self.precision == "fp32":
            return found
        found += [f"block_size={self.group}", f"accuracy_level={4 if self.activations == 'int8' else 1}"]
        if self.precision == "int8":
            return found
        wide = "last_matmul:int8" + (",mixed_layers:int8" if self.mixed else "")
        found += ["is_symmetric=false", f"matmul_mixed_precision={wide}"]
        # two methods that round alike: with the default one, tied embeddings of eight bits get names that the graph
        # lacks; the other cannot pack the zero points of an odd number of groups
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        widths = (config.hidden_size, config.intermediate_size, size * config.num_attention_heads)
        packs = all(-(-width // self.group) % 2 == 0 for width in widths)
        return [*found, *(["algo_config=rtn"] if config.tie_word_embeddings and packs else ["shared_embeddings=false"])]

    def ensures(self, out: Path) -> None:
        for name in (GRAPH, SETTINGS, "tokenizer.json"):
            if not (out / name).is_file():
                raise RuntimeError(f"{name} was not written")
        found = _products(out)
        allowed = {f"int{bits}" for bits in WHOLE.get(self.precision, ())} or {"float32"}
        if not found or found.keys() - allowed or (self.precision == "int4" and not found["int4"]):
            raise RuntimeError(f"products by weights are {dict(found)}, not {self.precision}")


def _products(folder: Path) -> Counter[str]:
    """How many products by weights the graph has, by the type of the weights."""
    graph = read_graph(folder)
    weights = {tensor.name for tensor in graph.initializer}
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type == "MatMul" and weights & set(node.input):
            found["float32"] += 1
        if node.op_type == "MatMulNBits":
            (bits,) = (attribute.i for attribute in node.attribute if attribute.name == "bits")
            found[f"int{bits}"] += 1
    return found
