"""What running an artifact takes, by its kind: what the plan says before anything runs. No framework is imported here.

The factors were fitted to what was measured on models of 0.1 to 2 GB (benchmarks/results/memory.json), and rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence

from optimize.models.encoding import BATCH_SIZES
from optimize.models.language import WINDOW
from optimize.models.speech import WRITTEN
from optimize.models.tasks import TASKS
from optimize.pipeline.contract import Cell, Checkpoint, Form, Kind
from optimize.pipeline.memory import EAGER, MIB

# kind -> bytes without weights, and how often the artifact's weights are resident: mapped from the file, and once more
# where the runtime lays them out anew for the processor
RESIDENT = {
    Kind.CHECKPOINT: (EAGER, 1.0),
    Kind.AOTI: (EAGER, 2.0),
    Kind.ONNX: (500 * MIB, 2.0),
    Kind.ONNX_GPU: (2000 * MIB, 2.0),  # on the host: CUDA's libraries, and weights on their way to the GPU
    Kind.OPENVINO: (500 * MIB, 2.2),
    Kind.GGUF: (150 * MIB, 2.0),
    Kind.OLLAMA: (300 * MIB, 2.0),  # its server among it
    Kind.GENAI: (500 * MIB, 2.2),
    Kind.TORCHSCRIPT: (EAGER, 2.0),
    Kind.IPEX: (2200 * MIB, 3.0),  # its torch brings CUDA's libraries
    Kind.TENSORRT: (500 * MIB, 2.0),  # on the host, where an engine is read before it goes to the GPU
    Kind.TENSORRT_RTX: (500 * MIB, 2.0),
    Kind.TENSORRT_LLM: (EAGER, 2.0),
    # the file is mapped by every process and counted once; and rows that are cut, which are copied
    Kind.TENSOR_PARALLEL: (EAGER, 1.5),
    Kind.VLLM: (6000 * MIB, 2.0),  # on the host: compilers, CUDA's libraries, and weights on their way to the GPU
    Kind.CUDA_GRAPHS: (3000 * MIB, 1.0),  # on the host
}
HEARD = 1500  # positions of the encoder for one clip
# of a GPU, beside weights and what is computed with them: CUDA's context, its libraries' workspaces, graphs, and what
# their allocators keep
GPU_FIXED = {Kind.VLLM: 6000 * MIB}
GPU_REST = 2500 * MIB
LOGITS = 4  # copies of a window's logits, while it is scored
FEATURES = 40  # numbers that are alive at once for each one of an image, at most: the first layers of a wide ResNet


def running_memory(kind: Kind, checkpoint: Checkpoint, workload: Sequence[Cell]) -> int:
    """Bytes that a worker has resident at most: an artifact open in it, every cell run, and judged on text.

    The checkpoint's weight_bytes are those of the artifact.
    """
    fixed, copies = RESIDENT[kind]
    return fixed + int(copies * checkpoint.weight_bytes) + _working(checkpoint, workload)


def gpu_memory(kind: Kind, checkpoint: Checkpoint, workload: Sequence[Cell], shards: int = 1) -> int:
    """Bytes of each GPU that an artifact takes at most, whose weights lie on `shards` of them.

    The checkpoint's weight_bytes and dtype are those of the artifact.
    """
    width = 4 if checkpoint.dtype == "float32" else 2
    weights = min(checkpoint.weight_bytes, width * checkpoint.parameters)  # a server may cast them as it loads them
    working = _working(checkpoint, workload) * width // 4
    if kind is Kind.CUDA_GRAPHS:
        working += width * _captured(checkpoint, workload)
    if kind is Kind.CHECKPOINT and shards > 1:  # whole layers lie on each, and all logits on the last
        layer = weights // max(checkpoint.dimensions.layers, 1)
        return GPU_REST + weights // shards + layer + working
    if kind is Kind.TENSOR_PARALLEL:  # each has all logits; not every transformers cuts embeddings
        embeddings = width * checkpoint.dimensions.vocabulary * checkpoint.dimensions.hidden
        return GPU_REST + weights // shards + embeddings + working
    return GPU_FIXED.get(kind, GPU_REST) + (weights + working) // shards


def _captured(checkpoint: Checkpoint, workload: Sequence[Cell]) -> int:
    """Numbers of the caches of generations: each captured shape has its own, all the time."""
    sizes, form = checkpoint.dimensions, TASKS[checkpoint.task].form
    if form is Form.PROMPTS:
        return sizes.cache * sum(cell.tokens for cell in workload)
    if form is Form.CLIPS:
        positions = HEARD + WRITTEN + sum(cell.batch * (HEARD + cell.new) for cell in workload)
        return 2 * sizes.hidden * sizes.layers * positions
    return 0


def _working(checkpoint: Checkpoint, workload: Sequence[Cell]) -> int:
    """Activations, logits and KV cache, in float32; attention does not write down scores of pairs of tokens."""
    sizes, task = checkpoint.dimensions, TASKS[checkpoint.task]
    if task.form is Form.CLIPS:  # the encoder reads half as many positions as there are frames
        clips = max(cell.batch for cell in workload)
        positions = HEARD * clips
        written = clips * max(cell.new for cell in workload)
        layers = 2 * sizes.hidden * sizes.layers * (positions + written)  # what the decoder keeps of both
        return 4 * (
            positions * (8 * sizes.hidden + 3 * sizes.intermediate) + 2 * layers
            + LOGITS * sizes.vocabulary * WRITTEN + sizes.clip * (clips + (task.examples or 0))
        )  # fmt: skip
    if task.form is Form.IMAGES:
        images = max(max(BATCH_SIZES), *(cell.batch for cell in workload))
        return 4 * sizes.image * (FEATURES * images + 2 * (task.examples or 0))  # what it is judged on is held, too
    window = min(WINDOW, checkpoint.max_length)
    rows = 1 if task.generates else max(BATCH_SIZES)
    tokens = max(rows * window, *(cell.batch * cell.sequence for cell in workload))
    activations = tokens * (8 * sizes.hidden + 3 * sizes.intermediate)
    if task.generates:
        cache = sizes.cache * max(window, *(cell.tokens for cell in workload))
        return 4 * (activations + cache + LOGITS * sizes.vocabulary * window)
    outputs = sizes.vocabulary if task.auto_class == "AutoModelForMaskedLM" else sizes.hidden
    return 4 * (activations + 2 * outputs * tokens)
