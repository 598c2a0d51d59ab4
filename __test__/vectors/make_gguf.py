"""Makes __test__/vectors/gguf/types/TYPE.gguf: blocks of random bytes as tensor "blocks", and the values that the gguf
package (llama.cpp's own) reads from them as tensor "values". Scales are random half-precision numbers, subnormal and
negative ones among them, but finite.

    pip install gguf==0.19.0 && python __test__/vectors/make_gguf.py
"""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

OUT = Path(__file__).parent / "gguf" / "types"
ROWS, BLOCKS = 3, 2
# Bytes of a block where half-precision numbers begin.
HALVES = {
    T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82], T.Q3_K: [108],
    T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208], T.IQ4_NL: [0], T.IQ4_XS: [0], T.TQ1_0: [52], T.TQ2_0: [64],
    T.MXFP4: [], T.NVFP4: [],
}


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(20)
    for kind, halves in HALVES.items():
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (ROWS * BLOCKS, size), dtype=np.uint8)
        for place in halves:
            scales = random.integers(0, 1 << 16, ROWS * BLOCKS, dtype=np.uint16)
            # Infinities and NaN have all five bits of the exponent.
            scales = np.where(scales & 0x7C00 == 0x7C00, scales & 0x83FF, scales).astype(np.uint16)
            blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
        if kind == T.MXFP4:
            blocks[:, 0] = [0, 1, 2, 127, 200, 252]
        if kind == T.NVFP4:
            blocks[0, :4] = [0x00, 0x7F, 0x01, 0x7E]
        rows = blocks.reshape(ROWS, BLOCKS * size)
        values = gguf.dequantize(rows, kind).astype(np.float32)
        assert np.isfinite(values).all() and values.shape == (ROWS, BLOCKS * elements), kind
        writer = gguf.GGUFWriter(OUT / f"{kind.name}.gguf", "llama")
        writer.add_tensor("blocks", rows, raw_dtype=kind)
        writer.add_tensor("values", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


if __name__ == "__main__":
    main()
