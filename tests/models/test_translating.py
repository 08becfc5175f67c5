"""Settings of transformers 5 in the words of transformers 4, which tests/test_optimum.py reads checkpoints with."""

from typing import Any

import pytest

from optimize.models.translating import older_config, older_tokenizer

SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e5}, {"rope_theta": 1e5}),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
         {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        (SCALED | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": SCALED}),
        ({"full_attention": SCALED | {"rope_theta": 1e6},
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
         {"rope_theta": 1e6, "rope_scaling": SCALED, "rope_local_base_freq": 1e4}),
    ],
)  # fmt: skip
def test_positions_are_spelt_out(rope: dict[str, Any], expected: dict[str, Any]) -> None:
    config = {"model_type": "some", "rope_parameters": rope, "dtype": "float32"}
    assert older_config(config) == config | {"torch_dtype": "float32"} | expected


def test_parts_of_a_model_are_translated_too() -> None:
    part = {"model_type": "text", "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert older_config({"text_config": part})["text_config"]["rope_theta"] == 7.0


@pytest.mark.parametrize(
    "rope",
    [
        {"full_attention": {"rope_theta": 1.0}, "linear_attention": {"rope_theta": 1.0}},
        {"sliding_attention": SCALED | {"rope_theta": 1.0}},
    ],
)
def test_what_has_no_word_is_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="transformers 4"):
        older_config({"rope_parameters": rope})


def test_a_tokenizer_of_a_class_that_is_new_has_that_which_was_there() -> None:
    settings = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<a>"],
                "model_max_length": 5}  # fmt: skip
    expected = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "model_max_length": 5,
    }
    assert older_tokenizer(settings) == expected
    assert older_tokenizer(expected) == expected
