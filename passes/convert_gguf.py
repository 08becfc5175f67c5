"""convert-gguf: one model.gguf for llama.cpp, Ollama and everything that is built on them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.models.checkpoint import read_config
from optimize.passes import _ggml, _gguf_tokenizer
from optimize.passes._gguf_families import FAMILIES, Family, rope, why_not
from optimize.passes._modelfile import modelfile
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS

MODEL = "model.gguf"
HEAD = "lm_head.weight"
PIECE = 1 << 20  # weights that are converted at a time
SKIPPED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers that old checkpoints carry
EXACT = ("token_types", "position_embd", "ffn_gate_inp")  # small, or decisive: never quantized

# bytes of a weight, most of them being matrices; with what is kept wider
WIDTHS = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 1.0625, "q4_0": 0.7, "q4_1": 0.75, "q4_k_m": 0.7, "q5_k_m": 0.8,
          "q6_k": 0.85}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: known before its weights are read, so that one at a time is in memory."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Any]]  # float32, a piece of rows after the other


@dataclass(frozen=True)
class ConvertGguf(Pass):
    """Write every weight in one of GGUF's types; rows that do not fill its blocks of 32 stay in 16 bits.

    With four bits, the embeddings, which are also what picks the next token, are kept in eight. The K-quants, by
    llama.cpp's names and mixtures, are made by its own quantizer; rows that do not fill their blocks of 256 take the
    next wider type, as there.
    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, llama.cpp's src/llama-quant.cpp
    """

    name: ClassVar = "convert-gguf"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.GGUF
    version: ClassVar = 1
    tools: ClassVar = ("gguf", "safetensors", "torch", "transformers", "xllamacpp")

    type: Literal["f32", "bf16", "f16", "q8_0", "q4_0", "q4_1", "q4_k_m", "q5_k_m", "q6_k"] = "q8_0"

    @property
    def arithmetic(self) -> str | None:
        return {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(self.type, "int8")

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        config = read_config(checkpoint.folder)
        return why_not(checkpoint.architecture, config) or _gguf_tokenizer.why_not(checkpoint.folder)

    def memory(self, checkpoint: Checkpoint) -> int:
        # one tensor as it is stored and as it is written; experts of one layer are one tensor there
        config = read_config(checkpoint.folder)
        experts = config.get("num_experts") or config.get("num_local_experts")
        stored = checkpoint.weight_bytes / checkpoint.parameters
        return FRAMEWORKS + int((stored + WIDTHS[self.type]) * checkpoint.largest * (experts or 1))

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        return int(WIDTHS[self.type] * checkpoint.parameters)

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import gguf
        import numpy as np

        config = read_config(source.path)
        family = FAMILIES[config["architectures"][0]]
        writer = gguf.GGUFWriter(out / MODEL, family.name)
        _add_metadata(writer, config, source.path)
        tensors = list(_tensors(source.path, config, family))
        layers = config.get("num_hidden_layers") or config["n_layer"]
        types = {tensor.name: self._type_of(tensor, layers) for tensor in tensors}
        for tensor in tensors:
            kind = types[tensor.name]
            shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
        writer.add_file_type(_file_type(self.type))
        _gguf_tokenizer.add_tokenizer(writer, source.path, config["vocab_size"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_quantized(tensor, types[tensor.name]))
        writer.close()
        text, remark = modelfile(source.path, MODEL)
        (out / "Modelfile").write_text(text, encoding="utf-8")
        matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
        wide = [tensor.name for tensor in matrices if types[tensor.name].name.lower() != self.type]
        facts = {"tensors": len(tensors), "matrices": len(matrices), "in_other_types": wide}
        return facts | ({"modelfile": remark} if remark else {})

    def _type_of(self, tensor: Planned, layers: int) -> Any:
        from gguf import GGMLQuantizationType as Type

        if len(tensor.shape) == 1 or any(part in tensor.name for part in EXACT):
            return Type.F32
        picks = tensor.name in ("token_embd.weight", "output.weight")
        if "_k" in self.type:
            wanted = (
                "Q6_K" if picks or (self.type.endswith("_m") and _more_bits(tensor.name, layers)) else self.type[:4]
            )
            wanted = wanted.upper()
            wanted = _ggml.NARROWER[wanted] if tensor.shape[-1] % _ggml.BLOCK else wanted
        else:
            wanted = "Q8_0" if picks and self.type.startswith("q4") else self.type.upper()
        return Type.F16 if wanted.startswith("Q") and tensor.shape[-1] % 32 else Type[wanted]

    def ensures(self, out: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(out / MODEL)
        if not reader.tensors or "tokenizer.ggml.tokens" not in reader.fields:
            raise ValueError(f"{MODEL} lacks tensors or a tokenizer")


def _quantized(tensor: Planned, kind: Any) -> Any:
    """All bytes of a tensor, uint8 of [bytes]."""
    import gguf
    import numpy as np

    quantize = _ggml.quantize if kind.name in _ggml.NARROWER else gguf.quants.quantize
    found, end = np.empty(math.prod(gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)), dtype=np.uint8), 0
    for piece in tensor.read():
        part = quantize(np.ascontiguousarray(piece), kind).view(np.uint8).reshape(-1)
        begin, end = end, end + part.size
        found[begin:end] = part
    assert end == found.size, f"{tensor.name}: {end} of {found.size} bytes"
    return found


def _more_bits(name: str, layers: int) -> bool:
    """Whether the mixtures whose names end in _m keep six bits of a tensor, as llama.cpp's use_more_bits."""
    match = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down|ffn_down_exps)\.weight", name)
    if match is None:
        return False
    index, eighth = int(match[1]), layers // 8
    return index < eighth or index >= 7 * layers // 8 or (index - eighth) % 3 == 2


def _file_type(name: str) -> int:
    import gguf

    types = gguf.LlamaFileType
    return int(types.ALL_F32 if name == "f32" else types[f"MOSTLY_{name.upper()}"])


def _add_metadata(writer: Any, config: dict[str, Any], folder: Path) -> None:
    """The architecture's numbers, under the names that both generations of configs have for them."""
    import gguf

    heads = config.get("num_attention_heads") or config["n_head"]
    hidden = config.get("hidden_size") or config["n_embd"]
    layers = config.get("num_hidden_layers") or config["n_layer"]
    positions = config.get("max_position_embeddings") or config["n_positions"]
    writer.add_name(folder.name)
    writer.add_context_length(positions)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden)
    writer.add_head_count(heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if "n_positions" in config:  # GPT-2: learned positions, and layer norms
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    size = config.get("head_dim") or hidden // heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    parameters = rope(config)
    writer.add_rope_dimension_count(int(size * parameters.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size") or config["intermediate_size"])


def _tensors(folder: Path, config: dict[str, Any], family: Family) -> Iterator[Planned]:
    """The checkpoint's weights under GGUF's names, each with what reads it."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(architecture, layers)
    stored = _stored(folder)
    tied = config.get("tie_word_embeddings", "n_positions" in config)
    embedding = next(key for key in stored if names.get_name(key, try_suffixes=(".weight",)) == "token_embd.weight")
    experts: dict[str, list[str]] = {}
    for key in stored:
        if key.endswith(SKIPPED) or (tied and key == HEAD and _same(stored, key, embedding)):
            continue
        before, number, after = _expert(key)
        if number is not None:
            experts.setdefault(f"{before}.experts.{after}", []).append(key)
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"GGUF has no name for {key} in the architecture {family.name}")
        shape = stored[key][1]
        yield Planned(name, shape[::-1] if key.endswith(family.conv1d or ("\0",)) else shape,
                      lambda key=key: _read(stored[key][0], key, config, family))  # type: ignore[misc]  # fmt: skip
    for key, parts in experts.items():
        name = names.get_name(key, try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"GGUF has no name for {key} in the architecture {family.name}")
        parts.sort(key=lambda part: _expert(part)[1] or 0)
        yield Planned(name, (len(parts), *stored[parts[0]][1]),
                      lambda parts=parts: chain.from_iterable(
                          _read(stored[part][0], part, config, family) for part in parts))  # type: ignore[misc]  # fmt: skip
    if rope(config)["rope_type"] == "llama3":
        frequencies = _llama3_factors(config)
        yield Planned("rope_freqs.weight", frequencies.shape, lambda: [frequencies])


def _same(stored: dict[str, tuple[Path, tuple[int, ...]]], one: str, other: str) -> bool:
    """Whether two weights are equal, some rows at a time."""
    from safetensors import safe_open

    shape = stored[one][1]
    if shape != stored[other][1]:
        return False
    with safe_open(stored[one][0], framework="pt") as first, safe_open(stored[other][0], framework="pt") as second:
        step = max(1, PIECE // shape[1])
        pieces = (slice(begin, begin + step) for begin in range(0, shape[0], step))
        return all(first.get_slice(one)[piece].equal(second.get_slice(other)[piece]) for piece in pieces)


def _stored(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Name of a weight -> the file that has it, and its shape."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a file is no mapping)
                found[key] = (path, tuple(file.get_slice(key).get_shape()))
    return found


def _read(path: Path, key: str, config: dict[str, Any], family: Family) -> Iterator[Any]:
    """One weight in float32, some rows at a time; rows of rotated attention, which change places, all at once."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        weights = file.get_slice(key)
        shape = weights.get_shape()
        if len(shape) == 1:
            offset = family.norm_offset if key.endswith("norm.weight") else 0.0
            yield weights[:].float().numpy() + offset
        elif family.paired_rope and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads"]
            if key.endswith("k_proj.weight"):
                heads = config.get("num_key_value_heads") or heads
            rows, columns = shape
            parts = weights[:].float().numpy().reshape(heads, 2, rows // heads // 2, columns)
            yield parts.swapaxes(1, 2).reshape(rows, columns)
        elif key.endswith(family.conv1d or ("\0",)):
            step = max(1, PIECE // shape[0])
            for begin in range(0, shape[1], step):
                yield weights[:, begin : begin + step].float().numpy().T
        else:
            step = max(1, PIECE // math.prod(shape[1:]))
            for begin in range(0, shape[0], step):
                yield weights[begin : begin + step].float().numpy()


def _expert(key: str) -> tuple[str, int | None, str]:
    """`model.layers.0.mlp.experts.3.up_proj.weight` -> (`model.layers.0.mlp`, 3, `up_proj.weight`)."""
    before, found, rest = key.partition(".experts.")
    number, _, after = rest.partition(".")
    return (before, int(number), after) if found and number.isdigit() else (key, None, "")


def _llama3_factors(config: dict[str, Any]) -> Any:
    """What each frequency is divided by. Source: https://arxiv.org/abs/2407.21783 (Llama 3.1), transformers'
    _compute_llama3_parameters.
    """
    import numpy as np

    parameters = rope(config)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = 1.0 / parameters["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
    lengths = 2 * math.pi / frequencies
    old, low, high = (parameters[name] for name in
                      ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))  # fmt: skip
    smooth = np.clip((old / lengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / parameters["factor"] + smooth)).astype(np.float32)
