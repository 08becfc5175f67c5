"""A Whisper model as two OpenVINO graphs: an encoder that gives what the decoder attends to, a stateful decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ENCODER = "openvino_encoder.xml"
CROSS = "cross_attention_cache"  # in the names of the decoder's states that the encoder fills


def save_speech_model(model: Any, inputs: dict[str, Any], encoder: Path, decoder: Path) -> int:
    """Write both. The encoder gives keys and values of every decoder layer, in the order of layers, so that they are
    computed once for each clip; the decoder takes one token at a time. Returns how many operations they have.
    """
    import openvino
    import torch
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter
    from transformers.exporters.utils import decompose_for_generation

    class Heard(torch.nn.Module):  # type: ignore[misc]
        """[batch, mels, frames] to keys and values of [batch, heads, positions, size]."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_features: Any) -> Any:
            states = self.model.get_encoder()(input_features).last_hidden_state
            layers = [layer.encoder_attn for layer in self.model.get_decoder().layers]
            shape = (states.shape[0], -1, layers[0].num_heads, layers[0].head_dim)
            parts = [part(states) for layer in layers for part in (layer.k_proj, layer.v_proj)]
            return tuple(part.view(shape).transpose(1, 2) for part in parts)

    (sounds,) = inputs.values()
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        heard = torch.export.export(Heard(), (sounds,), dynamic_shapes=({0: batch},))
    first = openvino.convert_model(heard)
    first.reshape({first.inputs[0]: [-1, *sounds.shape[1:]]})
    openvino.save_model(first, encoder, compress_to_fp16=False)
    step, given = decompose_for_generation(model, inputs)["decode"]
    whole = OpenVINOExporter().export(step, given, config=OpenVINOConfig(dynamic=True)).program
    # the encoder's states are an input for nothing but to be given back
    results = [result for result in whole.get_results() if "logits" in result.input_value(0).get_names()]
    taken = [each for each in whole.get_parameters() if "encoder" not in each.get_friendly_name()]
    second = openvino.Model(results, whole.get_sinks(), taken, "decoder")
    openvino.save_model(second, decoder, compress_to_fp16=False)
    return len(first.get_ordered_ops()) + len(second.get_ordered_ops())
