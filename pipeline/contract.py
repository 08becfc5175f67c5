"""The words of the system as types: everything else is written against this file.

Nothing here imports an ML framework, and nothing here knows a particular pass, target or runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

Array = NDArray[Any]
Batch = Mapping[str, Array]  # input or output name -> array; the first axis is the batch
Labels = tuple[int, ...] | tuple[float, ...] | tuple[tuple[int, ...], ...] | tuple[tuple[str, ...], ...]


class Word(str, Enum):
    """A word of this system. As enum.StrEnum, which a toolchain's Python may be too old for."""

    __str__ = str.__str__

    def __format__(self, form: str) -> str:
        return str.__format__(self, form)


QUANTIZED = ("int8", "float8_e4m3fn")  # dtypes that products are quantized to
SPREAD = "auto"  # in place of a device: all GPUs, as accelerate puts whole layers on them
DEFAULT = "default"  # the toolchain that is this interpreter


class Kind(Word):
    """What a folder holds. The value is the word used in recipes' errors, manifests and the store."""

    CHECKPOINT = "checkpoint"  # config.json and *.safetensors, as transformers saves them
    AOTI = "aoti"  # model.pt2, an AOTInductor package
    ONNX = "onnx"  # model.onnx with model.onnx.data
    ONNX_GPU = "onnxruntime-gpu"  # the same, and provider.json: what runs it on a GPU
    OPENVINO = "openvino"  # openvino_model.xml and .bin
    GGUF = "gguf"  # model.gguf, for llama.cpp
    OLLAMA = "ollama"  # model.gguf and the Modelfile from which Ollama makes its model
    GENAI = "onnxruntime-genai"  # genai_config.json, model.onnx with model.onnx.data, and a tokenizer
    TORCHSCRIPT = "torchscript"  # model.pt, traced and frozen
    IPEX = "ipex"  # the same with operations of intel-extension-for-pytorch
    TENSORRT = "tensorrt"  # model.engine, and what its builder says of it
    TENSORRT_RTX = "tensorrt-rtx"  # the same, compiled to the end by the driver of the GPU that runs it
    CUDA_GRAPHS = "cuda-graphs"  # a checkpoint, and graphs.json: the shapes that it is captured at where it is opened
    TENSOR_PARALLEL = "tensor-parallel"  # a checkpoint, and tensor_parallel.json: how many processes share its layers
    VLLM = "vllm"  # a checkpoint, serve.yaml for `vllm serve`, and vllm.json: what it was measured with
    TENSORRT_LLM = "tensorrt-llm"  # engines, or a quantized checkpoint; and what runs it must know

    @property
    def toolchain(self) -> str:
        """The environment that opens such a folder."""
        apart = (Kind.ONNX_GPU, Kind.IPEX, Kind.TENSORRT, Kind.TENSORRT_RTX, Kind.TENSORRT_LLM, Kind.VLLM)
        return self.value if self in apart else DEFAULT


class Meaning(Word):
    """What the last axis of a judged output is, which says how two of them are compared."""

    VECTOR = "vector"  # a direction and a length
    CHOICE = "choice"  # logits of which the largest is the answer
    FLAGS = "flags"  # logits of which each is an answer: yes above 0
    NUMBERS = "numbers"  # each by itself: a score
    NEXT = "next"  # logits of the next token, given those before it


class LabelKind(Word):
    """What one example of labelled data is labelled with."""

    CLASS = "class"  # one class of the model, by index
    SCORE = "score"  # a number: how alike two texts are to people
    TAGS = "tags"  # a class for each word, by index
    ANSWERS = "answers"  # every text that is right; of none, the question cannot be answered
    CHOICE = "choice"  # the right one of a question's choices, by index
    TARGETS = "targets"  # every text that is right, of which a language model writes one
    TRANSCRIPT = "transcript"  # what is said

    @property
    def names_classes(self) -> bool:
        """Whether labels are the model's own classes, by its own names."""
        return self in (LabelKind.CLASS, LabelKind.TAGS)

    @property
    def of_questions(self) -> bool:
        """Whether a language model is asked: its questions are judged beside running text, not in place of it."""
        return self in (LabelKind.CHOICE, LabelKind.TARGETS)


@dataclass(frozen=True)
class Labelling:
    """What people say of the examples that are evaluated (of the pairs, for sentence-similarity)."""

    kind: LabelKind
    labels: Labels
    classes: dict[int, str] | None = None  # the model's own names, where labels are its classes


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model that say how much memory running it takes beside its weights; 0 where a config has none."""

    hidden: int = 0
    intermediate: int = 0
    layers: int = 0
    vocabulary: int = 0
    cache: int = 0  # numbers that the KV cache keeps of one token, over all layers
    image: int = 0  # numbers of one image as the model takes it
    clip: int = 0  # likewise of one sound
    attended: int = 0  # numbers that attention gives of one token: its heads', one after the other


@dataclass(frozen=True)
class Checkpoint:
    """A model id or local folder, resolved to a pinned revision and a list of files with digests."""

    model_id: str  # of the hub, without the revision; or a local folder's name
    folder: Path
    revision: str | None  # the hub's commit; None for a local folder
    task: str
    architecture: str  # the class that transformers builds, such as BertModel
    dtype: str  # the dtype of most of its weights, in torch's spelling
    parameters: int
    weight_bytes: int
    max_length: int  # the longest sequence that it takes, in tokens
    files: Mapping[str, str]  # relative path -> sha256, of every file that may enter an artifact
    largest: int = 0  # elements of its largest tensor
    dimensions: Dimensions = Dimensions()

    @property
    def name(self) -> str:
        """The last part of the id: what emitted folders are called after."""
        return self.model_id.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Target:
    """Where the artifact will run. Probed facts, not wishes."""

    name: str  # "cpu"
    device: str  # the processor's own name; of a GPU target, the GPU's
    arch: str  # "x86_64", "aarch64"; of a GPU, its compute capability: "9.0"
    features: tuple[str, ...]  # the instruction sets that change what compilers emit
    dtypes: tuple[str, ...]  # dtypes with arithmetic of their own on this device
    cores: int  # that this process may use
    memory: int  # bytes that this process may use, on the host
    gpus: int = 0  # that the artifact runs on; none is the processor
    gpu_memory: int = 0  # bytes of each
    driver: str = ""  # of the GPUs
    links: str = ""  # between several of them: "NVLink" or "PCIe"
    gpu_used: int = 0  # bytes of one of them that others held when it was probed, at most
    gpu_clock: int = 0  # MHz that one of their multiprocessors reaches at most

    @property
    def device_type(self) -> str:
        """Where sessions compute, in torch's spelling."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True)
class Artifact:
    """A folder of one kind with its key and digest: a pass's output in the store, or a checkpoint."""

    kind: Kind
    path: Path
    key: str  # lineage: known before it is built
    digest: str  # content: sha256 over its files, known after

    @property
    def is_stored(self) -> bool:
        """Whether it lies in the store: the checkpoint as the user has it has no digest but its key."""
        return self.digest != self.key


class Form(Word):
    """What a model is given, by how a cell of its workload is written."""

    TOKENS = "BATCHxTOKENS"
    PROMPTS = "BATCHxPROMPT+NEW"
    IMAGES = "BATCH"  # each as large as the checkpoint's image processor makes it
    CLIPS = "BATCH+NEW"  # sounds, each as long as the model hears at once, and the tokens that are written of it

    @property
    def words(self) -> str:
        """As titles have it."""
        named = {Form.IMAGES: "batch of images", Form.CLIPS: "batch of clips + new tokens"}
        return named.get(self) or self.replace("x", " x ").lower()

    @property
    def reader(self) -> str:
        """What a checkpoint makes inputs with."""
        return {Form.IMAGES: "image processor", Form.CLIPS: "feature extractor"}.get(self, "tokenizer")


@dataclass(frozen=True)
class Cell:
    """One point of the workload: what is timed as one call."""

    batch: int
    sequence: int = 0  # tokens, all of them real; of a generation, those of the prompt; 0 of images and clips
    new: int = 0  # tokens that are generated for each prompt; 0 is one forward pass
    weight: int = 1  # in the mean over all cells; what is built does not depend on it

    def __str__(self) -> str:
        """Without its weight."""
        return f"{self.batch}" + (f"x{self.sequence}" if self.sequence else "") + (f"+{self.new}" if self.new else "")

    @property
    def weighted(self) -> str:
        """As it was asked for."""
        return str(self) if self.weight == 1 else f"{self}*{self.weight}"

    @property
    def form(self) -> Form:
        """How it is written."""
        if not self.sequence:
            return Form.CLIPS if self.new else Form.IMAGES
        return Form.PROMPTS if self.new else Form.TOKENS

    @property
    def tokens(self) -> int:
        """All that go through the model in one call; an image counts as one."""
        return self.batch * max(self.sequence + self.new, 1)


@dataclass(frozen=True)
class Context:
    """What a pass may know besides its source. Whatever it uses of this must be in its key."""

    task: str
    target: Target
    calibration: Path | None = None  # an .npz of model inputs (see models/encoding.py), never of evaluation examples
    workload: tuple[Cell, ...] = ()  # what will be measured


@dataclass(frozen=True)
class Placement:
    """On which GPUs an artifact runs."""

    shards: int = 1  # GPUs that share one copy of the weights
    replicas: int = 1  # copies of them

    @property
    def gpus(self) -> int:
        return self.shards * self.replicas


@dataclass(frozen=True)
class Pass(ABC):
    """One transformation: reads a read-only folder of one kind, fills an empty folder of another kind.

    The fields of a subclass are its options; with the class variables they make its part of the key. A subclass lives
    in passes/NAME.py, imports its library inside `run`, and raises anything it likes: the worker turns it into a
    `PassError` that names the step.
    """

    name: ClassVar[str]  # as written in a recipe: the file's name with dashes
    accepts: ClassVar[Kind]
    produces: ClassVar[Kind]
    version: ClassVar[int]  # bump when the output changes for the same input and options
    tools: ClassVar[tuple[str, ...]]  # distributions whose versions enter the key
    toolchain: ClassVar[str] = DEFAULT  # the environment it runs in: see targets/toolchains/
    target_facts: ClassVar[tuple[str, ...]] = ()  # fields of Target that change the output, such as "features"

    @property
    def calibrated(self) -> bool:
        """Whether, with these options, it reads calibration data (whose digest then enters the key)."""
        return False

    @property
    def arithmetic(self) -> str | None:
        """The dtype that matrix products run in from here on, in torch's spelling; None: the same as before."""
        return None

    @property
    def shaped(self) -> bool:
        """Whether what it makes is for the shapes of the workload (which then enters the key)."""
        return False

    @property
    def placement(self) -> Placement:
        """On which GPUs what it makes runs."""
        return Placement()

    def on_one_gpu(self) -> Pass | None:
        """The same pass, but that what it makes runs on one GPU; None where it is left out then."""
        return self

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        """Why it cannot run for this checkpoint here, or None. Cheap: it imports no framework."""
        return None

    def memory(self, checkpoint: Checkpoint) -> int:
        """Bytes that its process has resident at most, frameworks included. Cheap, as `requires`.

        The checkpoint's dtype and weight_bytes are those of what the pass reads, not of what the recipe began with.
        """
        return (1 << 30) + 3 * 4 * checkpoint.parameters

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        """Bytes of the weights in what it makes, about: those of what it reads, unless a pass says otherwise."""
        return checkpoint.weight_bytes

    def extra_memory(self, checkpoint: Checkpoint) -> int:
        """Bytes that whoever runs what it makes has resident beyond what artifacts of that kind take otherwise."""
        return 0

    @abstractmethod
    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        """Fill the empty folder `out`; write nowhere else. Returns coverage and other facts for the manifest."""

    def ensures(self, out: Path) -> None:  # noqa: B027 (a pass with nothing more to check is fine)
        """Raise unless `out` is what was promised. Checked before publication into the store."""


@dataclass(frozen=True)
class Recipe:
    """One candidate way to lower the checkpoint for a target. No passes: the checkpoint as it is."""

    name: str
    passes: tuple[Pass, ...]
    after: str = ""  # the name of another recipe: this one is built only where that one proves inaccurate
    default: bool = True  # tried where no recipe is asked for; else only by its name

    @property
    def produces(self) -> Kind:
        return self.passes[-1].produces if self.passes else Kind.CHECKPOINT

    @property
    def placement(self) -> Placement:
        return self.passes[-1].placement if self.passes else Placement()

    @property
    def toolchains(self) -> tuple[str, ...]:
        """The environments that it needs beside the default one, to be built and to be run."""
        names = [*(step.toolchain for step in self.passes), self.produces.toolchain]
        return tuple(dict.fromkeys(name for name in names if name != DEFAULT))

    def why_not(self, checkpoint: Checkpoint, target: Target) -> str | None:
        """Why one of its passes cannot run for this checkpoint there, whatever is installed; or None."""
        for step in self.passes:
            if (reason := step.requires(checkpoint, target)) is not None:
                return reason if self.name.partition("{")[0] == step.name else f"{step.name}: {reason}"
        return None

    def arithmetic(self, dtype: str) -> str:
        """The dtype that its matrix products run in, for a checkpoint of that dtype. What was quantized stays so."""
        chosen = [dtype, *filter(None, (step.arithmetic for step in self.passes))]
        return next((each for each in chosen if each in QUANTIZED), chosen[-1])


@dataclass(frozen=True)
class Gates:
    """What a candidate must prove. See docs/measuring.md for what each number is compared with."""

    max_drop: float = 0.001  # of fidelity to the float32 reference (1 - mean cosine), or of the task's metric
    min_speedup: float = 1.05  # the lower end of the speedup's interval must be above it
    max_load: float = 0.2  # share of the processors, or of the GPU, that foreign work may take meanwhile


class Objective(Word):
    """What the best of those that pass is best at."""

    LATENCY = "latency"  # speedup over all cells of the workload
    THROUGHPUT = "throughput"  # speedup at the cell with the most tokens
    MEMORY = "memory"  # of a GPU, most memory held; then peak resident memory
    SIZE = "size"  # bytes on disk


@dataclass(frozen=True)
class StepFacts:
    """What is known of one built step: stored with the artifact, shown in the table, kept in the manifest."""

    seconds: float
    peak_memory: int  # bytes resident in the worker, at most, while the step ran
    facts: dict[str, Any] = field(default_factory=dict)  # what the pass reported: coverage and the like
