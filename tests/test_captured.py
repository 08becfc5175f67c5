"""Generation over captured shapes: on a processor the same work uncaptured, with `-m gpu` the graphs."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from optimize.models.checkpoint import resolve
from optimize.models.loading import load_model
from optimize.models.speech import encode_all
from optimize.models.tasks import Examples
from optimize.passes._captured_generation import language_shapes, speech_shapes
from optimize.passes._cuda_graphs import COMPILED, GRAPHS
from optimize.passes._grouped_heads import GROUPED
from optimize.passes.compile_cuda import CompileCuda
from optimize.pipeline.batches import SOUND
from optimize.pipeline.contract import Array, Cell, Target
from optimize.targets.runtimes import eager
from optimize.targets.runtimes.cuda_graphs import open_generation
from optimize.targets.runtimes.generating import stepwise, write_until
from tests.conftest import MakeCheckpoint

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
TEXT, SPEECH = "text-generation", "automatic-speech-recognition"
TOKENS = np.random.default_rng(0).integers(5, 500, 60)
CELLS = (Cell(1, 8, 6), Cell(3, 12, 5))
ELSEWHERE = """
import json, logging, sys
from pathlib import Path
import numpy as np
from optimize.models.loading import load_model
from optimize.targets.runtimes.cuda_graphs import open_generation
logging.basicConfig()
folder, prompts = Path(sys.argv[1]), [np.array(each) for each in json.loads(sys.argv[2])]
session = open_generation(folder, load_model(folder, "text-generation", device="cuda"))
print(json.dumps(session.generate(prompts, 5).tokens.tolist()))
"""
EXPERTS = "DeepseekV32ForCausalLM"
GROUPING = ("LlamaForCausalLM", "MistralForCausalLM")
# the third has a window that is longer than any cell, the fourth attention that is not torch's, the last layers that
# keep more than keys and values, and products whose weights it also takes by themselves
ARCHITECTURES: dict[str, dict[str, int]] = {
    "LlamaForCausalLM": {},
    "GPT2LMHeadModel": {},
    "MistralForCausalLM": {"sliding_window": 64},
    "GPTJForCausalLM": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8},
    EXPERTS: {
        "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "index_n_heads": 4, "index_head_dim": 16,
    },
}  # fmt: skip


def opened(folder: Path, out: Path, task: str, shapes: Any, device: str, *, compiled: bool = False) -> tuple[Any, Any]:
    """An eager session, and one over captured shapes."""
    shutil.copytree(folder, out)
    (out / GRAPHS).write_text(json.dumps({"shapes": shapes, "compile": compiled, "autotune": False, "fill": 0}))
    plain = eager.open_session(folder, task, 2, device)
    return plain, open_generation(out, load_model(out, task, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_of_any_lengths_are_continued_as_eager_does(
    make_language_model: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, device: str
) -> None:
    shapes, grouped = language_shapes(CELLS), list[tuple[int, ...]]()
    assert shapes == [(1, 8, 6), (3, 12, 5)]
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        grouped.append(tuple(query.shape[1:3]))
        return attend(query, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    folder = make_language_model(architecture, **ARCHITECTURES[architecture])
    if device == "cuda" and architecture == EXPERTS:  # torch's products of experts wait for the GPU, but in bfloat16
        with pytest.raises(ValueError, match="it could not be captured"):
            opened(folder, tmp_path / "a", TEXT, shapes, device)
        return
    plain, captured = opened(folder, tmp_path / "a", TEXT, shapes, device)
    for lengths, new in (([8], 6), ([5], 6), ([12, 12, 12], 5), ([9, 3], 4), ([4], 2), ([40], 3), ([2] * 4, 3)):
        prompts: list[Array] = [TOKENS[at : at + length] for at, length in enumerate(lengths)]
        expected, found = plain.generate(prompts, new), captured.generate(prompts, new)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        assert found.tokens.dtype == np.int64 and len(found.seconds) == new
        assert list(found.seconds) == sorted(found.seconds)
        wanted, given = plain.prefill(prompts, new), captured.prefill(prompts, new)
        for column in range(new - 1):
            np.testing.assert_allclose(given, wanted, atol=2e-3)
            following = np.full(len(prompts), 7 + column)  # not the likeliest: what is given counts
            wanted, given = plain.step(following), captured.step(following)
        np.testing.assert_allclose(given, wanted, atol=2e-3)
    np.testing.assert_allclose(captured.logits(TOKENS, 9), plain.logits(TOKENS, 9), atol=2e-3)
    assert ((2, 2) in grouped) is (architecture in GROUPING)  # their four heads over two of keys
    # compiled, too, where transformers would copy keys
    assert (captured.model.config._attn_implementation == GROUPED) is (architecture != "GPTJForCausalLM")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("batch", "shared", "group", "size", "length"),
    [(1, 8, 4, 128, 160), (3, 2, 1, 80, 33), (2, 2, 3, 64, 700), (1, 1, 20, 256, 1100), (64, 8, 4, 64, 80)],
)
def test_one_query_attends_as_torch_does_in_more_bits(
    batch: int, shared: int, group: int, size: int, length: int, masked: bool, dtype: torch.dtype
) -> None:
    from optimize.targets.runtimes.one_query import attended

    torch.manual_seed(0)
    draw = partial(torch.randn, device="cuda", dtype=dtype)
    query, key, value = draw(batch, shared, group, size), *(draw(batch, shared, 2 * length, size) for _ in range(2))
    key, value = key[:, :, ::2], value[:, :, :length]  # of any strides, but for the last axis
    mask = torch.rand(batch, 1, 1, length, device="cuda") > 0.4 if masked else None
    if mask is not None:
        mask[-1, ..., : 2 * length // 3] = False  # whole parts that nothing is attended to in
    scale = 0.7 * size**-0.5
    inputs = (each.double() for each in (query, key, value))
    exact = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scale)
    found = attended(query, key, value, mask, scale)
    assert found.dtype == dtype
    error = 8e-3 if dtype is torch.bfloat16 else 1e-3  # torch's own kernels are off by as much: answers have 8 bits
    torch.testing.assert_close(found.double(), exact, atol=error * float(exact.abs().max()), rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_in_16_bits_attend_by_a_kernel_of_their_own(
    make_language_model: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    from optimize.targets.runtimes import one_query

    calls, attend = list[int](), one_query.attended

    def watched(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(key.shape[2])
        return attend(query, key, *rest)

    folder = make_language_model()
    half = shutil.copytree(folder, tmp_path / "half")
    load_model(folder, TEXT).to(torch.bfloat16).save_pretrained(half)
    if not compiled:  # which would trace what watches
        monkeypatch.setattr(one_query, "attended", watched)
    plain, captured = opened(half, tmp_path / "a", TEXT, [(2, 12, 5)], "cuda", compiled=compiled)
    assert set(calls) == (set() if compiled else {17})
    prompts = [TOKENS[:12], TOKENS[12:19]]
    wanted, found = plain.prefill(prompts, 5), captured.prefill(prompts, 5)
    for column in range(4):
        np.testing.assert_allclose(found, wanted, atol=0.1 * float(np.abs(wanted).max()))
        wanted, found = plain.step(np.full(2, 7 + column)), captured.step(np.full(2, 7 + column))
    if compiled:  # another process knows nothing but what was kept
        captured._captured.call.save(tmp_path / "a" / COMPILED)
        command = [sys.executable, "-c", ELSEWHERE, tmp_path / "a", json.dumps([each.tolist() for each in prompts])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == captured.generate(prompts, 5).tokens.tolist()
        assert "compiled again" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_experts_are_captured_in_bfloat16(make_language_model: MakeCheckpoint, tmp_path: Path, compiled: bool) -> None:
    folder = make_language_model(EXPERTS, **ARCHITECTURES[EXPERTS])
    half = shutil.copytree(folder, tmp_path / "half")
    load_model(folder, TEXT).to(torch.bfloat16).save_pretrained(half)
    plain, captured = opened(half, tmp_path / "a", TEXT, [(2, 12, 5)], "cuda", compiled=compiled)
    prompts = [TOKENS[:12], TOKENS[12:19]]
    answers = [(plain.prefill(prompts, 5), captured.prefill(prompts, 5))]
    for column in range(4):
        given = np.full(2, 7 + column)
        answers.append((plain.step(given), captured.step(given)))
    for wanted, found in answers:
        np.testing.assert_allclose(found, wanted, atol=0.1 * float(np.abs(wanted).max()))


def test_what_makes_positions_of_a_mask_is_left_out(make_language_model: MakeCheckpoint) -> None:
    h100 = Target("gpu", "H100", "9.0", (), ("float16",), 16, 128 << 30, 1, 80 << 30)
    llama, bloom = (resolve(str(make_language_model(name))) for name in ("LlamaForCausalLM", "BloomForCausalLM"))
    assert CompileCuda().requires(llama, h100) is None
    assert "ALiBi" in (CompileCuda().requires(bloom, h100) or "")


@pytest.mark.parametrize("device", DEVICES)
def test_no_more_is_written_than_there_is_room_for(
    make_language_model: MakeCheckpoint, tmp_path: Path, device: str
) -> None:
    _, captured = opened(make_language_model(), tmp_path / "a", TEXT, language_shapes(CELLS), device)
    tokens = captured.prefill([TOKENS[:8]], 6).argmax(axis=-1)
    kept = captured.step(tokens)
    before = kept.copy()
    for _ in range(4):
        captured.step(tokens)
    np.testing.assert_array_equal(kept, before)  # no view of a buffer
    with pytest.raises(ValueError, match="6 tokens are written"):
        captured.step(tokens)


def test_a_window_that_is_shorter_than_a_cell_is_refused(make_language_model: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_language_model("MistralForCausalLM", sliding_window=16)
    opened(folder, tmp_path / "a", TEXT, [(1, 8, 8)], "cpu")
    with pytest.raises(ValueError, match="a cell of 17 tokens is longer than the 16"):
        opened(folder, tmp_path / "b", TEXT, [(1, 8, 9)], "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_clips_are_transcribed_as_eager_does(make_speech_model: MakeCheckpoint, tmp_path: Path, device: str) -> None:
    folder = make_speech_model()
    shapes = speech_shapes((Cell(1, 0, 4), Cell(3, 0, 6)), folder)
    assert shapes == [(1, 2, 4), (3, 2, 6), (1, 2, 42)]
    plain, captured = opened(folder, tmp_path / "a", SPEECH, shapes, device)
    drawn = [{"audio": {"drawn": index}} for index in range(4)]
    clips = [batch[SOUND] for batch in encode_all(folder, Examples(drawn, max_length=44))["evaluation"]]
    for rows, new in ((1, 4), (2, 6), (3, 6), (1, 42), (4, 3)):
        expected, found = stepwise(plain, clips[:rows], new), captured.generate(clips[:rows], new)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
    endings = (write_until(each, clips[:1], 42, lambda tokens: tokens[-1] == 2) for each in (plain, captured))
    assert next(endings) == next(endings)
    np.testing.assert_allclose(captured.logits(clips[0], TOKENS[:9]), plain.logits(clips[0], TOKENS[:9]), atol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("task", [TEXT, SPEECH])
def test_compiled_steps_write_the_same_and_are_opened_without_a_trace(
    make_language_model: MakeCheckpoint, make_speech_model: MakeCheckpoint, tmp_path: Path, task: str, device: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    speech = task == SPEECH
    folder = make_speech_model() if speech else make_language_model(num_hidden_layers=1)
    shapes = [(1, 2, 4)] if speech else [(2, 8, 5)]
    given = [np.zeros((16, 600), np.float32)] if speech else [TOKENS[:8], TOKENS[8:13]]
    plain, built = opened(folder, tmp_path / "a", task, shapes, device, compiled=True)
    expected = stepwise(plain, given, 4)
    np.testing.assert_array_equal(built.generate(given, 4).tokens, expected.tokens)
    built._captured.call.save(tmp_path / "a" / COMPILED)
    torch._dynamo.reset()
    counters.clear()
    found = open_generation(tmp_path / "a", load_model(tmp_path / "a", task, device=device))
    np.testing.assert_array_equal(found.generate(given, 4).tokens, expected.tokens)
    np.testing.assert_array_equal(found.prefill(given, 4), built.prefill(given, 4))
    assert not counters["stats"]["unique_graphs"] and "compiled again" not in caplog.text
