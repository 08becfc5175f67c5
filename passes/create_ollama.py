"""create-ollama: prove that Ollama takes a GGUF and its Modelfile as a model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from optimize.passes._links import link_tree
from optimize.passes._ollama import MODELFILE, NAME, OllamaServer, why_not
from optimize.passes.convert_gguf import MODEL
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS

SHOWN = ("template", "system", "parameters", "capabilities")


@dataclass(frozen=True)
class CreateOllama(Pass):
    """Make a model of the folder in a private Ollama server, and carry the folder along for whoever runs it there.

    Ollama keeps a copy of the weights of its own: it is thrown away, and made anew by `ollama create` where the folder
    is used. So Ollama's version does not change what is made here, and is not in the key.
    Source: https://docs.ollama.com/modelfile
    """

    name: ClassVar = "create-ollama"
    accepts: ClassVar = Kind.GGUF
    produces: ClassVar = Kind.OLLAMA
    version: ClassVar = 1
    tools: ClassVar = ()

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        return why_not()

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS  # the server copies the file

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        link_tree(source.path, out)
        with tempfile.TemporaryDirectory(prefix="ollama-") as scratch, OllamaServer(Path(scratch)) as server:
            server.create(out)
            shown = server.ask("POST", "/api/show", {"model": NAME})
            return {"ollama": server.version} | {name: shown[name] for name in SHOWN if shown.get(name)}

    def ensures(self, out: Path) -> None:
        for name in (MODEL, MODELFILE):
            if not (out / name).is_file():
                raise ValueError(f"{name} is missing")
