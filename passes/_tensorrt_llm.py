"""Every call that is made of TensorRT-LLM: nobody here has run them, so that tests hold each name and argument to
tests/tensorrt_llm_double.py, which says where each was read.

Its line 1.2 is the last that builds engines; later ones run checkpoints alone, quantized by Model Optimizer, which they
bring along. Source: https://nvidia.github.io/TensorRT-LLM
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from optimize.passes._limits import Limits

FACTS = "tensorrt_llm.json"  # what whoever opens the folder must know
SERVE = "serve.yaml"  # for trtllm-serve --config
ENGINES_UNTIL = (1, 2)
KV_FRACTION = 0.85  # of the GPU memory that is free once the weights lie there

Quantization = Literal["none", "fp8", "int4_awq"]
TextFolder = Path  # of a train.jsonl with a column `text`, as its own calibration reads one


def has_engines(version: str) -> bool:
    """Whether that version of TensorRT-LLM builds engines."""
    return tuple(map(int, version.split(".")[:2])) <= ENGINES_UNTIL


def build_engine(
    source: Path, out: Path, dtype: str, quantization: Quantization, gpus: int, limits: Limits, texts: TextFolder
) -> None:
    """Fill `out` with engines, one for each GPU. They also give the logits of a prompt, which they are judged by."""
    from tensorrt_llm._tensorrt_engine import LLM
    from tensorrt_llm.llmapi import BuildConfig, CalibConfig, QuantAlgo, QuantConfig

    algorithms = {"none": None, "fp8": QuantAlgo.FP8, "int4_awq": QuantAlgo.W4A16_AWQ}
    llm = LLM(
        model=str(source),
        skip_tokenizer_init=True,
        tensor_parallel_size=gpus,
        dtype=dtype,
        build_config=BuildConfig(
            max_batch_size=limits.batch, max_input_len=limits.prompt, max_seq_len=limits.sequence,
            max_num_tokens=limits.tokens, gather_context_logits=True,
        ),
        quant_config=QuantConfig(quant_algo=algorithms[quantization]),
        calib_config=CalibConfig(calib_dataset=str(texts), calib_max_seq_length=limits.prompt),
    )  # fmt: skip
    llm.save(str(out))
    llm.shutdown()


def quantize_checkpoint(
    source: Path, out: Path, dtype: str, quantization: Quantization, batches: Sequence[Any]
) -> None:
    """Fill `out` with the checkpoint, its products by weights quantized; `batches` are int64 tokens of [sequence]."""
    import torch
    from modelopt.torch import quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), local_files_only=True)
    model = model.cuda() if torch.cuda.is_available() else model

    def run_all(instance: Any) -> None:
        for tokens in batches:
            instance(torch.from_numpy(tokens)[None].to(instance.device))

    with torch.inference_mode():
        config = mtq.FP8_DEFAULT_CFG if quantization == "fp8" else mtq.INT4_AWQ_CFG
        mtq.quantize(model, config, run_all)
        export_hf_checkpoint(model, export_dir=out)


def serve_settings(gpus: int, limits: Limits) -> dict[str, Any]:
    """What trtllm-serve, and LLM by the same names, is to be started with."""
    return {
        "tensor_parallel_size": gpus,
        "max_batch_size": limits.batch,
        "max_num_tokens": limits.tokens,
        "max_seq_len": limits.sequence,
        "kv_cache_config": {"free_gpu_memory_fraction": KV_FRACTION, "enable_block_reuse": True},
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": limits.batch},
    }


def write_facts(out: Path, version: str, gpus: int, limits: Limits) -> dict[str, Any]:
    """FACTS, and SERVE, which is JSON and so YAML."""
    facts = {"version": version, "engine": has_engines(version), "gpus": gpus, "limits": asdict(limits)}
    (out / FACTS).write_text(json.dumps(facts, indent=1))
    if not facts["engine"]:
        (out / SERVE).write_text(json.dumps(serve_settings(gpus, limits), indent=1))
    return facts


def open_llm(path: Path) -> Any:
    """A model that answers requests. Prompts that were asked before are read again: reuse would help a measurement."""
    facts = json.loads((path / FACTS).read_text())
    if facts["engine"]:
        from tensorrt_llm._tensorrt_engine import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        cache = KvCacheConfig(free_gpu_memory_fraction=KV_FRACTION, enable_block_reuse=False)
        return LLM(model=str(path), skip_tokenizer_init=True, tensor_parallel_size=facts["gpus"], kv_cache_config=cache)
    from tensorrt_llm import LLM
    from tensorrt_llm.llmapi import CudaGraphConfig, KvCacheConfig

    settings = json.loads((path / SERVE).read_text())
    settings["kv_cache_config"] = KvCacheConfig(**settings["kv_cache_config"] | {"enable_block_reuse": False})
    settings["cuda_graph_config"] = CudaGraphConfig(**settings["cuda_graph_config"])
    return LLM(model=str(path), skip_tokenizer_init=True, **settings)


def context_logits(llm: Any, tokens: Sequence[int]) -> Any:
    """The logits after each token of a prompt: [sequence, vocabulary], a torch tensor on the processor."""
    from tensorrt_llm.llmapi import SamplingParams

    asked = SamplingParams(max_tokens=1, end_id=-1, pad_id=0, detokenize=False, return_context_logits=True)
    answer = llm.generate({"prompt_token_ids": list(tokens)}, sampling_params=asked, use_tqdm=False)
    return answer.context_logits.float().cpu()


def stream(llm: Any, tokens: Sequence[int], new: int) -> Iterator[Sequence[int]]:
    """What was generated greedily so far, whenever it grows: `new` tokens in the end, past any that ends a text."""
    from tensorrt_llm.llmapi import SamplingParams

    asked = SamplingParams(max_tokens=new, end_id=-1, pad_id=0, top_k=1, ignore_eos=True, detokenize=False)
    for answer in llm.generate_async({"prompt_token_ids": list(tokens)}, sampling_params=asked, streaming=True):
        yield answer.outputs[0].token_ids
