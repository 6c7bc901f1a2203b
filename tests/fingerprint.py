"""Digests of every op's results and gradients, to be compared between threads and instruction sets.

``python tests/fingerprint.py [THREADS ...]`` prints them as JSON, by number of threads. The inputs come from NumPy, since
torch's own random numbers and elementary functions differ by instruction set.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import torch
from accuracy import evaluate
from cases import (
    LAYOUTS,
    SCALAR_REDUCTIONS,
    elementary,
    gaussians,
    images,
    latents,
    noise,
    pairs,
    random_bits,
    sums_to_round,
)
from likelihoods_table import ROWS
from test_logistic_mixture import pictures
from torch import Tensor

import fastvae
from fastvae.likelihoods import LogisticMixture
from fastvae.random import philox_normal

SMALL, LARGE = (3, 1000), (2, 70001)  # the larger is shared among threads


def digest(*tensors: Tensor) -> str:
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """logvar over all that exp can take in float32, where implementations of exp differ most."""
    stretch = {"logvar": 30, "logvar_p": 30}
    return {k: (t * stretch.get(k, 1)).clamp(-85, 85) for k, t in tensors.items()}


def fingerprints() -> dict[str, str]:
    out = {}

    def add(key: str, op, tensors, upstream=None, **options) -> None:
        result = evaluate(op, tensors, upstream, **options)
        out[f"{op.__name__} {key}"] = digest(*result.outputs, *result.grads.values())

    for shape in (SMALL, LARGE):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            out[f"philox_normal {shape} {dtype}"] = digest(
                philox_normal(*shape, seed=5, dtype=dtype)
            )
            tensors = wide(latents(shape, dtype))
            with_prior = wide(latents(shape, dtype, prior=True))
            key = f"{shape} {dtype}"
            for name, eps in [("drawn", {}), ("given", {"eps": noise(shape, dtype)})]:
                for op, t in [
                    (fastvae.reparameterize, tensors),
                    (fastvae.sample_and_kl, tensors),
                    (fastvae.sample_and_kl, with_prior),
                ]:
                    g = {} if eps else {"generator": torch.Generator().manual_seed(2)}
                    add(f"{key} {name} {len(t)}", op, t | eps, **g)
            for reduction in (*SCALAR_REDUCTIONS, "sample", "none"):
                for t in (tensors, with_prior):
                    add(f"{key} {reduction} {len(t)}", fastvae.kl_normal, t, reduction=reduction)
                pair = images(shape, dtype)
                add(f"{key} {reduction}", fastvae.reconstruction_loss, pair, reduction=reduction)
                if reduction != "none":
                    both = pair | wide(latents((shape[0], 600), dtype))
                    add(f"{key} {reduction}", fastvae.vae_loss, both, beta=0.3, reduction=reduction)
    # the gradients that the forward makes: an upstream gradient of the loss alone
    both = images(LARGE) | latents((LARGE[0], 600))
    for g in (1.0, 3.0):
        upstream = [torch.tensor(g), None, None]
        add(f"loss alone {g}", fastvae.vae_loss, both, upstream)
    for name, layout in LAYOUTS.items():
        strided = {k: layout(t) for k, t in latents((4, 6, 5, 35)).items()}
        add(f"{name}", fastvae.sample_and_kl, strided, generator=torch.Generator().manual_seed(2))
    # parameters of one for each channel: their gradients are sums over samples and pixels
    for dtype in (torch.float32, torch.float64):
        for name, row in ROWS.items():
            for activation in row.activations:
                tensors = row.tensors((3, 5, 4001), dtype, parameters="channel")
                options = {"activation": activation} if activation else {}
                one = row.likelihood(**options) if row.parameters else row.make(**options)
                add(
                    f"{name} {activation} {dtype}",
                    fastvae.reconstruction_loss,
                    tensors,
                    likelihood=one,
                )
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for last in (False, True):
            tensors = pictures((3, 13, 31), dtype=dtype, last=last)
            one = LogisticMixture(channel_dim=-1 if last else 1)
            for reduction in ("mean", "sample", "none"):
                key = f"mixture {last} {reduction} {dtype}"
                add(key, fastvae.reconstruction_loss, tensors, likelihood=one, reduction=reduction)
            drawn = one.sample(tensors["recon_x"], torch.Generator().manual_seed(2))
            out[f"mixture {last} {dtype}"] = digest(drawn)
    # more rows and components than a part has, and a few of each
    for rows, components, dims in ((700, 90, 5), (33, 300, 3)):
        for dtype in (torch.float32, torch.float64):
            for by_row in (False, True):
                key = f"{rows} {components} {dtype} {by_row}"
                tensors = pairs(rows, components, dims, dtype, by_row=by_row)
                add(key, fastvae.aggregate_posterior, tensors)
        del tensors["log_weight"]
        tensors["z"] = tensors["z"][:components]
        add(f"{rows} {components}", fastvae.kl_decomposition, tensors, dataset_size=9999)
    for rows, length in ((700, 5), (60, 33), (20, 130)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            tensors = gaussians((rows,), length, dtype, prior=False)
            i, j = torch.tril_indices(length, length)
            packed = tensors | {"scale_tril": tensors["scale_tril"][:, i, j]}
            for form, given in (("full", tensors), ("packed", packed)):
                key = f"{rows} {length} {dtype} {form}"
                for reduction in ("sample", "mean"):
                    add(
                        f"{key} {reduction}",
                        fastvae.kl_multivariate_normal,
                        given,
                        reduction=reduction,
                    )
                given = given | {"eps": noise((rows, length), dtype)}
                add(key, fastvae.sample_and_kl_multivariate_normal, given)
    for real in (np.float32, np.float64):
        sums = sums_to_round(real, 10_000)
        bits = random_bits(real, 10_000)
        for name in (
            "multiply_add",
            "exponential",
            "exponential_of_log_weight",
            "expm1_minus",
            "logarithm",
            "log1p",
        ):
            if name == "exponential_of_log_weight":
                bits = -np.abs(bits)
            result = elementary(name, *(sums if name == "multiply_add" else [bits]))
            result[np.isnan(result)] = np.nan  # whatever its sign and payload
            out[f"{name} {real.__name__}"] = digest(torch.from_numpy(result))
    return out


def by_threads(numbers: list[int]) -> dict[str, dict[str, str]]:
    before = torch.get_num_threads()
    out = {}
    for n in numbers:
        torch.set_num_threads(n)
        out[str(n)] = fingerprints()
    torch.set_num_threads(before)
    return out


if __name__ == "__main__":
    print(json.dumps(by_threads([int(n) for n in sys.argv[1:]] or [1])))
