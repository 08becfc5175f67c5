"""ggml's own quantizers, from the library that xllamacpp carries: the gguf package writes no K-quants."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

BLOCK = 256  # weights of one row that a K-quant takes together
# what llama.cpp takes where rows do not fill such blocks. Source: src/llama-quant.cpp, tensor_type_fallback
NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def library() -> Path:
    """The shared library with llama.cpp and ggml in it. Raises RuntimeError where there is none."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("xllamacpp is not installed: pip install xllamacpp")
    (path,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    return path


@cache
def _quantize_chunk() -> Any:
    function = ctypes.CDLL(str(library())).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *3 * [ctypes.c_int64], ctypes.c_void_p]
    return function


def quantize(array: Any, kind: Any) -> Any:
    """float32 of [..., columns] as a GGMLQuantizationType: uint8 of [..., bytes of a row]. K-quants only: columns are
    a multiple of BLOCK.

    Source: https://github.com/ggml-org/ggml/blob/master/include/ggml.h (ggml_quantize_chunk)
    """
    import gguf
    import numpy as np

    array = np.ascontiguousarray(array, dtype=np.float32)
    out = np.empty(gguf.quants.quant_shape_to_byte_shape(array.shape, kind), dtype=np.uint8)
    rows, columns = array.size // array.shape[-1], array.shape[-1]
    written = _quantize_chunk()(int(kind), array.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    if written != out.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {out.nbytes} as {kind.name}")
    return out
