"""Every op, dtype and way through memory once: what a new device has to pass first, and compute-sanitizer watches."""

from __future__ import annotations

import pytest
from accuracy import OUTPUTS, check
from cases import DTYPES, LAYOUTS, images, inputs, latents

LARGE = (9, 2056)  # several blocks on a GPU, rows of whole packs of 16 bytes
WAYS = {
    "small": ((5, 8), "contiguous"),
    "contiguous": (LARGE, "contiguous"),
    "ragged": ((9, 2051), "contiguous"),
    "chunk": (LARGE, "chunk"),
    "misaligned": (LARGE, "misaligned"),
    "expanded": (LARGE, "expanded_batch"),
    "transposed": (LARGE, "transposed"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OUTPUTS)
def test_smoke(op, dtype, way, device):
    shape, layout = WAYS[way]
    tensors = inputs(op, shape, dtype, device)
    if op == "vae_loss":
        tensors = images(shape, dtype, device=device) | latents(shape, dtype, device)
    tensors = {k: LAYOUTS[layout](t) for k, t in tensors.items()}
    for options in [{}] if op == "reparameterize" else [{}, {"reduction": "sample"}]:
        check(op, tensors, **options)
    if tensors.pop("eps", None) is not None:
        check(op, tensors, seed=3)
