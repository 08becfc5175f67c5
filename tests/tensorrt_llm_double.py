"""Stands in for TensorRT-LLM, which cannot be installed where this project is tested: the names and parameters that its
own source has, and behind them the model that transformers would run. A call with any other argument raises TypeError.

`READ` says where each was read: in its repository at the commits named, and in the reference of the later line that its
documentation holds.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

LLM_PY = "NVIDIA/TensorRT-LLM: tensorrt_llm/llmapi/llm.py (BaseLLM), line 1.2"
ENGINE_PY = "NVIDIA/TensorRT-LLM: tensorrt_llm/_tensorrt_engine/llm.py at cfba333"
ARGS_PY = "NVIDIA/TensorRT-LLM: tensorrt_llm/llmapi/llm_args.py (BaseLlmArgs, TrtLlmArgs), line 1.2"
CALIB_PY = "NVIDIA/TensorRT-LLM: tensorrt_llm/_tensorrt_engine/llm_args.py at e3cc74c"
BUILDER_PY = "NVIDIA/TensorRT-LLM: tensorrt_llm/builder.py at 008b2b8"
SAMPLING_PY = "NVIDIA/TensorRT-LLM: tensorrt_llm/sampling_params.py at 000a01d"
LATER = "TensorRT-LLM's documentation 1.3.0rc29: llm-api/reference, examples/llm_runtime"
EXPORT = "Model Optimizer's documentation: deployment/3_unified_hf, modelopt.torch.quantization"

# what is called -> the names of its parameters, as far as anyone calls them, and where they were read
READ: dict[str, tuple[str, str]] = {
    "_tensorrt_engine.LLM": (
        "model tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code tensor_parallel_size dtype revision "
        "tokenizer_revision build_config quant_config calib_config kv_cache_config fast_build workspace",
        f"{ENGINE_PY}; {ARGS_PY}",
    ),
    "LLM": (
        "model tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code tensor_parallel_size dtype revision "
        "tokenizer_revision max_batch_size max_num_tokens max_seq_len kv_cache_config cuda_graph_config "
        "enable_chunked_prefill",
        LATER,
    ),
    "LLM.generate": (
        "inputs sampling_params use_tqdm lora_request prompt_adapter_request kv_cache_retention_config "
        "disaggregated_params scheduling_params cache_salt",
        LLM_PY,
    ),
    "LLM.generate_async": (
        "inputs sampling_params lora_request prompt_adapter_request streaming kv_cache_retention_config "
        "disaggregated_params scheduling_params cache_salt",
        LLM_PY,
    ),
    "LLM.save": ("engine_dir", ENGINE_PY),
    "LLM.shutdown": ("", LLM_PY),
    "BuildConfig": (
        "max_input_len max_seq_len opt_batch_size max_batch_size max_beam_width max_num_tokens opt_num_tokens "
        "kv_cache_type gather_context_logits gather_generation_logits strongly_typed profiling_verbosity "
        "input_timing_cache output_timing_cache plugin_config",
        BUILDER_PY,
    ),
    "QuantConfig": ("quant_algo kv_cache_quant_algo group_size", f"{ARGS_PY}; examples/llm-api"),
    "CalibConfig": (
        "device calib_dataset calib_batches calib_batch_size calib_max_seq_length random_seed tokenizer_max_seq_length",
        CALIB_PY,
    ),
    "KvCacheConfig": ("enable_block_reuse free_gpu_memory_fraction dtype max_tokens", LATER),
    "CudaGraphConfig": ("batch_sizes max_batch_size enable_padding", LATER),
    "SamplingParams": (
        "end_id pad_id max_tokens stop_token_ids top_k top_p temperature seed logprobs prompt_logprobs "
        "return_context_logits return_generation_logits ignore_eos detokenize add_special_tokens",
        SAMPLING_PY,
    ),
    "mtq.quantize": ("model config forward_loop", EXPORT),
    "export_hf_checkpoint": ("model dtype export_dir", EXPORT),
}
QUANT_ALGO = {"FP8": "FP8", "W4A16_AWQ": "W4A16_AWQ"}  # tensorrt_llm/quantization/mode.py, examples/llm-api
SERVED = {"tensor_parallel_size", "max_batch_size", "max_num_tokens", "max_seq_len", "kv_cache_config",
          "cuda_graph_config"}  # fields of TorchLlmArgs: LATER; also examples/configs of that version  # fmt: skip


def bind(name: str, *arguments: Any, **named: Any) -> dict[str, Any]:
    """The arguments by name, as the recorded parameters take them. Raises TypeError for any that they do not have."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(each, kind, default=None) for each in READ[name][0].split()]
    return dict(inspect.Signature(parameters).bind(*arguments, **named).arguments)


def recorded(name: str) -> Callable[..., SimpleNamespace]:
    """A class that keeps what it was given."""
    return lambda *arguments, **named: SimpleNamespace(**bind(name, *arguments, **named))


class Model:
    """What LLM is, in both lines: a checkpoint that transformers runs."""

    name = "LLM"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.given = bind(self.name, *arguments, **named)
        made.append(self)
        folder = Path(self.given["model"])
        self.source = Path((folder / "rank0.engine").read_text()) if (folder / "rank0.engine").is_file() else folder
        from optimize.targets.runtimes.eager import open_session

        self.session: Any = open_session(self.source, "text-generation", 1)
        self.open = True

    def generate(self, *arguments: Any, **named: Any) -> SimpleNamespace:
        import numpy as np
        import torch

        given = bind("LLM.generate", *arguments, **named)
        assert given["sampling_params"].return_context_logits
        tokens = np.array(given["inputs"]["prompt_token_ids"])
        return SimpleNamespace(context_logits=torch.from_numpy(self.session.logits(tokens, len(tokens))))

    def generate_async(self, *arguments: Any, **named: Any) -> Iterator[SimpleNamespace]:
        import numpy as np

        from optimize.targets.runtimes.generating import generate

        given = bind("LLM.generate_async", *arguments, **named)
        asked = given["sampling_params"]
        assert given["streaming"] and asked.end_id == -1 and asked.top_k == 1
        tokens = generate(self.session, [np.array(given["inputs"]["prompt_token_ids"])], asked.max_tokens).tokens[0]
        for end in sorted({2, asked.max_tokens}):
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens[:end].tolist())])

    def shutdown(self) -> None:
        self.open = False


class EngineModel(Model):
    """LLM of the line that builds engines."""

    name = "_tensorrt_engine.LLM"

    def save(self, *arguments: Any, **named: Any) -> None:
        folder = Path(bind("LLM.save", *arguments, **named)["engine_dir"])
        for rank in range(self.given["tensor_parallel_size"]):
            (folder / f"rank{rank}.engine").write_text(str(self.source))
        (folder / "config.json").write_text(json.dumps({"build_config": vars(self.given["build_config"])}))
        if self.given["quant_config"].quant_algo:
            texts = Path(self.given["calib_config"].calib_dataset, "train.jsonl").read_text().splitlines()
            (folder / "texts.json").write_text(json.dumps([json.loads(line)["text"] for line in texts]))


made: list[Model] = []


def modules(line: str) -> dict[str, ModuleType]:
    """What `import tensorrt_llm` and `import modelopt` give of version `line`, for sys.modules."""
    names = ("tensorrt_llm", "tensorrt_llm._tensorrt_engine", "tensorrt_llm.llmapi", "modelopt", "modelopt.torch",
             "modelopt.torch.quantization", "modelopt.torch.export")  # fmt: skip
    found = {name: ModuleType(name) for name in names}
    api = found["tensorrt_llm.llmapi"]
    common = ["SamplingParams", "KvCacheConfig"]
    if line.startswith("1.2"):
        found["tensorrt_llm._tensorrt_engine"].LLM = EngineModel  # type: ignore[attr-defined]
        common += ["BuildConfig", "CalibConfig", "QuantConfig"]
        api.QuantAlgo = SimpleNamespace(**QUANT_ALGO)  # type: ignore[attr-defined]
    else:
        del found["tensorrt_llm._tensorrt_engine"]
        found["tensorrt_llm"].LLM = Model  # type: ignore[attr-defined]
        common += ["CudaGraphConfig"]
    for name in common:
        setattr(api, name, recorded(name))
    quantization, export = found["modelopt.torch.quantization"], found["modelopt.torch.export"]
    quantization.FP8_DEFAULT_CFG, quantization.INT4_AWQ_CFG = "fp8", "int4_awq"  # type: ignore[attr-defined]
    quantization.quantize = _quantize  # type: ignore[attr-defined]
    export.export_hf_checkpoint = _export  # type: ignore[attr-defined]
    found["modelopt.torch"].quantization = quantization  # type: ignore[attr-defined]
    return found


def _quantize(*arguments: Any, **named: Any) -> None:
    given = bind("mtq.quantize", *arguments, **named)
    given["model"].asked = given["config"]
    given["forward_loop"](given["model"])


def _export(*arguments: Any, **named: Any) -> None:
    given = bind("export_hf_checkpoint", *arguments, **named)
    given["model"].save_pretrained(given["export_dir"])
    (Path(given["export_dir"]) / "hf_quant_config.json").write_text(json.dumps(given["model"].asked))
