"""What other tools make of a language model, as passes: so that one run judges and times their artifacts and ours.

    PYTHONPATH=benchmarks/peers/language optimize MODEL --recipe gguf-q8_0 --recipe 'peer-optimum-intel{weights=int8}'

Each tool runs by its command line in an environment of its own, named by OPTIMIZE_PEERS, which `make` fills.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.passes.convert_openvino import RUNTIME_OPTIONS
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target


def run_tool(tool: str, *words: object) -> str:
    """Run a command of a tool's environment in a folder that is thrown away; its output is returned.

    Raises RuntimeError with the last lines when it fails.
    """
    programs = venv(tool) / "bin"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [programs / str(words[0]), *map(str, words[1:])], cwd=folder, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": "", "PATH": f"{programs}:{os.environ['PATH']}"},
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(done.stdout.splitlines()[-3:])}")
    return done.stdout


def venv(tool: str) -> Path:
    return Path(os.environ.get("OPTIMIZE_PEERS", "out/peers")).resolve() / f"venv-{tool}"


@dataclass(frozen=True)
class PeerOptimumIntel(Pass):
    """`optimum-cli export openvino` of optimum-intel, opened as openvino-genai opens it by itself."""

    name: ClassVar = "peer-optimum-intel"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.OPENVINO
    version: ClassVar = 1
    tools: ClassVar = ()

    weights: Literal["fp32", "fp16", "int8", "int4"] = "int8"

    @property
    def arithmetic(self) -> str | None:
        return "int8" if self.weights.startswith("int") else "bfloat16"

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        return (
            None if venv("optimum-intel").is_dir() else "its environment is missing: make out/peers/venv-optimum-intel"
        )

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        export = ("optimum-cli", "export", "openvino", "--model", source.path, "--weight-format", self.weights)
        # the default of 128 weights a scale fails where rows are no multiple of that: the tool then asks for less
        group = ("--group-size", 64) if self.weights == "int4" else ()
        run_tool(
            "optimum-intel", *export, *group, "--task", "text-generation-with-past", "--library", "transformers", out
        )
        (out / RUNTIME_OPTIONS).write_text(json.dumps({"PERFORMANCE_HINT": "LATENCY"}))
        return {}


@dataclass(frozen=True)
class PeerOlive(Pass):
    """`olive optimize` for the CPU, by its exporter for ONNX Runtime GenAI.

    Its int4 calibrates GPTQ on wikitext, from the hub: it fails without a network. Its int8 raises a KeyError.
    """

    name: ClassVar = "peer-olive"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.GENAI
    version: ClassVar = 1
    tools: ClassVar = ()

    precision: Literal["fp32", "int8", "int4"] = "fp32"

    @property
    def arithmetic(self) -> str | None:
        return "float32" if self.precision == "fp32" else "int8"

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        return None if venv("olive").is_dir() else "its environment is missing: make out/peers/venv-olive"

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        made = out.parent / f"{out.name}.olive"
        try:
            output = run_tool(
                "olive", "olive", "optimize", "--model_name_or_path", source.path, "--task", "text-generation",
                "--precision", self.precision, "--exporter", "model_builder", "--device", "cpu",
                "--provider", "CPUExecutionProvider", "--output_path", made, "--disable_telemetry",
            )  # fmt: skip
            configs = list(made.rglob("genai_config.json"))
            if not configs:
                raise RuntimeError(f"exit code 0, no model: {' '.join(output.splitlines()[-3:])}")
            shutil.copytree(configs[0].parent, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return {}
