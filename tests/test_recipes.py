"""The recipes give what the projects' own lines give, and the effective beta is the weight that a fit would find."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from accuracy import to_numpy
from cases import images, latents

from fastvae import recipes, vae_loss

B, PIXELS, LATENTS = 6, (3, 8, 5), (4, 2)
D, L = 120, 8

# The objectives as the projects write them, from sums of squared errors and of KL divergences over the batch.
FORMULAS = {
    "pythae": (lambda sse, kl, w: 0.5 * sse / B + w * kl / B, 1.0, lambda w: w),
    "pytorch_vae": (lambda sse, kl, w: sse / (B * D) + w * kl / B, 0.00025, lambda w: w * D / 2),
    "lightning_bolts": (
        lambda sse, kl, w: sse / (B * D) + w * kl / (B * L),
        0.1,
        lambda w: w * D / (2 * L),
    ),
    # images of 255 levels, and the whole divided by 255
    "disentangling_vae": (
        lambda sse, kl, w: 255**2 * sse / 255 / B + w * kl / B,
        4.0,
        lambda w: w / 510,
    ),
    "diffusers": (lambda sse, kl, w: sse / B + w * kl / B, 1e-6, lambda w: w / 2),
}


def sums(tensors) -> tuple[float, float]:
    recon_x, x, mu, logvar = (to_numpy(t) for t in tensors.values())
    kl = 0.5 * (np.expm1(logvar) - logvar + mu**2)
    return float(((recon_x - x) ** 2).sum()), float(kl.sum())


@pytest.mark.parametrize("weight", [None, 0.37])
@pytest.mark.parametrize("project", FORMULAS)
def test_a_recipe_is_the_projects_objective(project, weight, device):
    formula, default, beta_eff = FORMULAS[project]
    tensors = images((B, *PIXELS), device=device) | latents((B, *LATENTS), device=device)
    recipe = getattr(recipes, project)(*([] if weight is None else [weight]))
    weight = default if weight is None else weight

    loss = recipe.factor * vae_loss(**tensors, **recipe.options).loss
    assert loss.item() == pytest.approx(formula(*sums(tensors), weight), rel=1e-6)
    # Beside the squared error a small KL is hard to see: its weight by itself.
    kl_term = recipe.factor * recipe.options["beta"] * vae_loss(**tensors, **recipe.options).kl
    assert kl_term.item() == pytest.approx(formula(0.0, sums(tensors)[1], weight), rel=1e-6)
    assert recipes.effective_beta(D, L, **recipe.options) == pytest.approx(beta_eff(weight))


def test_every_recipe_is_tested():
    helpers = {"Options", "Recipe", "effective_beta"}
    assert set(recipes.__all__) - helpers == FORMULAS.keys()


def test_the_examples_of_the_readme():
    antixk = recipes.effective_beta(3 * 64 * 64, 128, **recipes.pytorch_vae().options)
    assert antixk == pytest.approx(1.536)
    assert recipes.effective_beta(3 * 64 * 64, 4, **recipes.diffusers().options) == 5e-7
    mnist = recipes.effective_beta(784, 20, reduction="mean") / recipes.effective_beta(784, 20)
    assert mnist == pytest.approx(39.2)


MIXED = [
    (likelihood, *reductions)
    for likelihood in ("mse", "gaussian")
    for reductions in itertools.product(("sum", "batchmean", "mean"), repeat=2)
]


@pytest.mark.parametrize(
    ("likelihood", "reduction", "kl_reduction"), [*MIXED, ("mse", "sample", "sample")]
)
def test_effective_beta_is_the_ratio_of_the_gradients(likelihood, reduction, kl_reduction):
    """Along recon_x and mu, 0.5 SSE + beta_eff KL has the gradients recon_x - x and beta_eff mu."""
    tensors = images((B, *PIXELS), torch.float64) | latents((B, *LATENTS), torch.float64)
    for name in ("recon_x", "mu"):
        tensors[name].requires_grad_()
    options = {"beta": 0.7, "likelihood": likelihood, "reduction": reduction}
    loss = vae_loss(**tensors, **options, kl_reduction=kl_reduction).loss.sum()
    d_recon_x, d_mu = torch.autograd.grad(loss, (tensors["recon_x"], tensors["mu"]))
    scale = d_recon_x / (tensors["recon_x"] - tensors["x"])
    got = recipes.effective_beta(D, L, **options, kl_reduction=kl_reduction, batch=B)
    torch.testing.assert_close(
        d_mu / tensors["mu"], torch.full_like(d_mu, got * scale[0, 0, 0, 0].item())
    )


def test_the_batch_is_asked_for_where_it_matters():
    assert recipes.effective_beta(10, 2, reduction="sum") == 0.5
    with pytest.raises(ValueError, match=r"effective_beta.*batch size; give batch"):
        recipes.effective_beta(10, 2, reduction="sum", kl_reduction="batchmean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "bce"}, "likelihood must be"),
        ({"reduction": "none"}, "reduction must be"),
        ({"kl_reduction": "avg"}, "kl_reduction must be"),
        ({"reduction": "sample", "kl_reduction": "sum"}, '"sample" goes with "sample" only'),
        ({"pixels": 0}, "at least 1"),
    ],
    ids=str,
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=rf"fastvae.recipes.effective_beta: .*{message}"):
        recipes.effective_beta(**({"pixels": 10, "latents": 2} | options))
