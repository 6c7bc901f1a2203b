"""The recipes give what the projects' own lines give, and the effective beta is the weight that a fit would find."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import to_numpy
from cases import images, latents, noise, pairs
from torch import Tensor

from fastvae import kl_normal, likelihoods, recipes, vae_loss

B, PIXELS, LATENTS = 6, (3, 8, 5), (4, 2)
D, L = 120, 8

# Those of a squared error as the projects write them, from sums of squared errors and of KL divergences over the batch.
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
    options = {"rec_dist": "gaussian"} if project == "disentangling_vae" else {}
    recipe = getattr(recipes, project)(*([] if weight is None else [weight]), **options)
    weight = default if weight is None else weight

    loss = recipe.factor * vae_loss(**tensors, **recipe.options).loss
    assert loss.item() == pytest.approx(formula(*sums(tensors), weight), rel=1e-6)
    # Beside the squared error a small KL is hard to see: its weight by itself.
    kl_term = recipe.factor * recipe.options["beta"] * vae_loss(**tensors, **recipe.options).kl
    assert kl_term.item() == pytest.approx(formula(0.0, sums(tensors)[1], weight), rel=1e-6)
    assert recipes.effective_beta(D, L, **recipe.options) == pytest.approx(beta_eff(weight))


def kl_sum(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def bce(recon_x, x, mu, logvar, **_):
    return F.binary_cross_entropy(recon_x, x, reduction="sum") + kl_sum(mu, logvar)


def pythae_bce(recon_x, x, mu, logvar, **_):
    recon = F.binary_cross_entropy(recon_x.flatten(1), x.flatten(1), reduction="none").sum(dim=-1)
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=-1)
    return (recon + 1.7 * kl).mean(dim=0)


def disentangling(loss):
    def objective(recon_x, x, mu, logvar, **_):
        latent_kl = 0.5 * (-1 - logvar + mu.pow(2) + logvar.exp()).mean(dim=0)
        return loss(recon_x, x, reduction="sum") / len(x) + 4 * latent_kl.sum()

    return objective


def laplace(recon_x, x, mu, logvar, scale, **_):
    nll = torch.abs(x - recon_x) / torch.exp(scale) + scale
    return nll.sum() / nll.shape[0] + 1e-6 * kl_sum(mu, logvar) / len(mu)


def sigma(recon_x, x, mu, logvar, scale, **_):
    log_sigma = -6 + F.softplus(scale + 6)
    nll = 0.5 * ((x - recon_x) / log_sigma.exp()) ** 2 + log_sigma + 0.5 * math.log(2 * math.pi)
    return nll.sum() + kl_sum(mu, logvar)


def act(recon_x, x, mu, logvar, pad, **_):
    error, valid = F.l1_loss(x, recon_x, reduction="none"), ~pad.unsqueeze(-1)
    mean_kld = (-0.5 * (1 + logvar - mu.pow(2) - logvar.exp())).sum(-1).mean()
    return (error * valid).sum() / (valid.sum() * error.shape[-1]) + 10 * mean_kld


# Of the others, the recipe's arguments and the project's lines in plain torch.
PLAIN: list[tuple[str, dict[str, Any], Any]] = [
    ("pytorch_examples", {}, bce),
    ("pythae", {"beta": 1.7, "reconstruction_loss": "bce"}, pythae_bce),
    ("disentangling_vae", {}, disentangling(F.binary_cross_entropy)),
    ("disentangling_vae", {"rec_dist": "laplace"}, disentangling(F.l1_loss)),
    ("latent_diffusion", {"logvar": "scale"}, laplace),
    ("sigma_vae", {"log_sigma": "scale"}, sigma),
    ("lerobot_act", {}, act),
]


def actions(device: Any) -> dict[str, Tensor]:
    """Probabilities [B, T, A], latents [B, L] and a scale; all of them want gradients but x."""
    recon_x, x = (t.sigmoid() for t in images((4, 10, 6), torch.float64, device=device).values())
    scale = torch.tensor(-0.4, dtype=torch.float64, device=device)
    tensors = {"recon_x": recon_x} | latents((4, 7), torch.float64, device) | {"scale": scale}
    return {name: t.requires_grad_() for name, t in tensors.items()} | {"x": x}


def gradients(loss: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    wanted = [t for t in tensors.values() if t.requires_grad]
    return loss, *torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize(("project", "options", "plain"), PLAIN, ids=[p[0] for p in PLAIN])
def test_a_recipe_has_the_projects_value_and_gradients(project, options, plain, device):
    tensors = actions(device)
    lengths = torch.tensor([[10], [4], [7], [1]], device=device)
    pad = torch.arange(10, device=device) >= lengths
    want = gradients(plain(**tensors, pad=pad), tensors)

    scale = tensors["scale"]
    recipe = getattr(recipes, project)(
        **{k: scale if v == "scale" else v for k, v in options.items()}
    )
    weight = (~pad).unsqueeze(-1).double() if project == "lerobot_act" else None
    arguments = {name: tensors[name] for name in ("recon_x", "x", "mu", "logvar")}
    loss = recipe.factor * vae_loss(**arguments, **recipe.options, weight=weight).loss
    torch.testing.assert_close(gradients(loss, tensors), want, rtol=1e-10, atol=1e-12)


def mixture_nll(logits, means, log_scales, raw, x, half_width, last):
    """PixelCNN++'s: [B, ..., K], the three others [B, 3, ..., K], x [B, 3, ..., 1] in [-1, 1]; a value for each pixel."""
    by = torch.tanh(raw)
    given = torch.stack(
        [torch.zeros_like(by[:, 0]), by[:, 0] * x[:, 0], by[:, 1] * x[:, 0] + by[:, 2] * x[:, 1]],
        dim=1,
    )
    centered, precision = x - (means + given), torch.exp(-log_scales.clamp(min=-7))
    upper, lower = precision * (centered + half_width), precision * (centered - half_width)
    inside = torch.log(torch.sigmoid(upper) - torch.sigmoid(lower))
    log_p = torch.where(x < -0.999, F.logsigmoid(upper), inside)
    log_p = torch.where(x > last, F.logsigmoid(-lower), log_p).sum(1)
    return -torch.logsumexp(log_p + torch.log_softmax(logits, -1), -1)


def mixture_inputs(bits: int, device: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Levels [B, 3, H, W] of a picture, recon_x [B, 10 K, H, W] and its parts as `mixture_nll` takes them."""
    levels = torch.randint(0, 2**bits, (3, 3, 4, 5), device=device)
    levels[0, :, 0, 0], levels[0, :, 0, 1], levels[0, :, 0, 2] = 0, 2**bits - 1, 2**bits - 2
    parts = [torch.randn(3, 3, 4, 5, 2, dtype=torch.float64, device=device) for _ in range(4)]
    parts[0] = parts[0][:, 0]
    parts[2] = 0.5 + 0.5 * parts[2]  # wide, so that the difference of two sigmoids has digits
    of_channel = torch.stack([p.movedim(-1, 2) for p in parts[1:]], 2)  # [B, 3, 3, K, H, W]
    recon_x = torch.cat([parts[0].movedim(-1, 1), of_channel.flatten(1, 3)], 1)
    return levels, recon_x, [p.requires_grad_() for p in parts]


@pytest.mark.parametrize("low_bit", [False, True])
def test_vdvae(low_bit, device):
    """Nats a dimension, as its ``elbo`` has them."""
    levels, recon_x, parts = mixture_inputs(5 if low_bit else 8, device)
    half_width = 1 / 31 if low_bit else 1 / 255
    x = 2 * levels.double() * half_width - 1
    mu, logvar = latents((3, 7), torch.float64, device).values()
    nll = mixture_nll(*parts, x.unsqueeze(-1), half_width, 0.999)
    kl = kl_sum(mu, logvar) / 3
    distortion, rate = nll.sum((1, 2)) / (3 * 4 * 5), kl / (3 * 4 * 5)
    want = distortion.mean() + rate
    recipe = recipes.vdvae(3 * 4 * 5, 2, low_bit)
    leaf = recon_x.detach().movedim(1, -1).requires_grad_()
    loss = recipe.factor * vae_loss(leaf, x.movedim(1, -1), mu, logvar, **recipe.options).loss
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    (d_logits,) = torch.autograd.grad(want, parts[0])
    got = torch.autograd.grad(loss, leaf)[0][..., :2]
    torch.testing.assert_close(got, d_logits, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("bits", [8, 5])
def test_nvae(bits, device):
    levels, recon_x, parts = mixture_inputs(bits, device)
    x = levels.double() / (2**bits - 1)
    mu, logvar = latents((3, 7), torch.float64, device).values()
    nll = mixture_nll(*parts, (2 * x - 1).unsqueeze(-1), 1 / (2**bits - 1), 0.99)
    want = nll.sum((1, 2)).mean() + 0.4 * kl_sum(mu, logvar) / 3
    recipe = recipes.nvae(0.4, 2, bits)
    leaf = recon_x.detach().requires_grad_()
    loss = recipe.factor * vae_loss(leaf, x, mu, logvar, **recipe.options).loss
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    (d_logits,) = torch.autograd.grad(want, parts[0])
    got = torch.autograd.grad(loss, leaf)[0][:, :2].movedim(1, -1)
    torch.testing.assert_close(got, d_logits, rtol=1e-7, atol=1e-10)


def test_the_optimal_sigma_vae(device):
    """With the project's soft limit through the recipe, and without it, as in the paper."""
    tensors = actions(device)
    recon_x, x, mu, logvar = (tensors[name] for name in ("recon_x", "x", "mu", "logvar"))
    log_sigma = ((x - recon_x) ** 2).mean(dim=[0, 1, 2], keepdim=True).sqrt().log()
    want = gradients(sigma(recon_x, x, mu, logvar, log_sigma), tensors)
    options = recipes.sigma_vae(log_sigma).options
    loss = vae_loss(recon_x, x, mu, logvar, **options).loss
    torch.testing.assert_close(gradients(loss, tensors), want, rtol=1e-10, atol=1e-12)

    nll = 0.5 * ((x - recon_x) / log_sigma.exp()) ** 2 + log_sigma + 0.5 * math.log(2 * math.pi)
    want = gradients(nll.sum() + kl_sum(mu, logvar), tensors)
    loss = likelihoods.optimal_gaussian(recon_x, x) + kl_normal(mu, logvar, reduction="sum")
    torch.testing.assert_close(gradients(loss, tensors), want, rtol=1e-10, atol=1e-12)


def test_the_perceptual_loss_of_latent_diffusion(device):
    """It is added to the errors before they are divided by the scale; the docstring says how to add it here."""
    tensors = actions(device)
    scale = tensors["scale"]
    recon_x, x = (tensors[name].unsqueeze(1) for name in ("recon_x", "x"))
    mu, logvar, p = tensors["mu"], tensors["logvar"], tensors["x"][:, :1, :1].unsqueeze(1)
    nll = ((x - recon_x).abs() + p) / scale.exp() + scale
    want = gradients(nll.sum() / 4 + 0.3 * kl_sum(mu, logvar) / 4, tensors)
    loss = vae_loss(recon_x, x, mu, logvar, **recipes.latent_diffusion(scale, 0.3).options).loss
    loss = loss + 10 * 6 * p.sum() * torch.exp(-scale) / 4
    torch.testing.assert_close(gradients(loss, tensors), want, rtol=1e-10, atol=1e-12)


def test_every_recipe_is_tested():
    helpers = {
        "Options",
        "Recipe",
        "effective_beta",
        "gather_posteriors",
        "nvae",
        "vdvae",
        "scvi",
    }  # the last three: above, and in test_scvi.py
    pairwise = {"beta_tcvae_terms", "first_column_log_weight", "mmd"}  # below
    assert set(recipes.__all__) - helpers - pairwise == FORMULAS.keys() | {
        name for name, _, _ in PLAIN
    }


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


def test_effective_beta_takes_objects():
    for name, likelihood in (
        ("mse", likelihoods.SquaredError(activation="sigmoid")),
        ("gaussian", likelihoods.Gaussian(full=True)),
    ):
        got = recipes.effective_beta(10, 2, beta=0.7, likelihood=likelihood)
        assert got == recipes.effective_beta(10, 2, beta=0.7, likelihood=name)


@pytest.mark.parametrize(
    ("project", "name", "need"),
    [
        ("pythae", "reconstruction_loss", '"mse" or "bce"'),
        ("disentangling_vae", "rec_dist", '"bernoulli" or "laplace" or "gaussian"'),
    ],
)
def test_wrong_names(project, name, need):
    message = f"fastvae.recipes.{project}: {name} must be {need}, but got 'huber'"
    with pytest.raises(ValueError, match=message):
        getattr(recipes, project)(**{name: "huber"})


def test_the_batch_is_asked_for_where_it_matters():
    assert recipes.effective_beta(10, 2, reduction="sum") == 0.5
    with pytest.raises(ValueError, match=r"effective_beta.*batch size; give batch"):
        recipes.effective_beta(10, 2, reduction="sum", kl_reduction="batchmean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "cosine"}, "likelihood must be"),
        ({"likelihood": "bce"}, "'bce', which belongs to no Gaussian decoder.*beta = 1"),
        ({"likelihood": likelihoods.L1()}, r"L1\(.*, which belongs to no Gaussian decoder"),
        ({"likelihood": likelihoods.Gaussian(0.5)}, "which has a scale of its own;"),
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


# beta-TCVAE's terms and MMD, as the projects write them --------------------------------------------


def log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / torch.exp(logvar))


def strided_weights(batch: int, n: int) -> Tensor:
    """Through the flattened matrix, by the step that three of the four codes take; the fourth's is the same number."""
    m = batch - 1
    weight = torch.full((batch, batch), 1 / m, dtype=torch.float64)
    weight.view(-1)[:: m + 1] = 1 / n
    weight.view(-1)[1 :: m + 1] = (n - m) / (n * m)
    weight[m - 1, 0] = (n - m) / (n * m)
    return weight.log()


@pytest.mark.parametrize("mss", [True, False])
@pytest.mark.parametrize("project", ["beta_tcvae", "pythae", "disentangling_vae", "pytorch_vae"])
def test_beta_tcvae(project, mss):
    n, tensors = 500, pairs(9, 9, 4, torch.float64, by_row=None)
    z, mu, logvar = tensors.values()
    matrix = log_density(z[:, None], mu[None], logvar[None])
    weight = strided_weights(9, n) if mss else torch.zeros(9, 9, dtype=torch.float64)
    if project in ("beta_tcvae", "pythae"):
        weight = weight if mss else weight - math.log(9 * n)
        log_qz = torch.logsumexp(weight + matrix.sum(2), 1)
        log_prod = torch.logsumexp(weight[:, :, None] + matrix, 1).sum(1)
    else:
        matrix = matrix + weight[:, :, None]
        log_qz = torch.logsumexp(matrix.sum(2), 1)
        log_prod = torch.logsumexp(matrix, 1).sum(1)
    log_q, log_p = log_density(z, mu, logvar).sum(1), log_density(z, 0 * z, 0 * z).sum(1)
    want = ((log_q - log_qz).mean(), (log_qz - log_prod).mean(), (log_prod - log_p).mean())
    got = recipes.beta_tcvae_terms(project, z, mu, logvar, n, mss=mss)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_where_their_stratified_weights_differ_from_the_paper_s():
    """1/N in the first column, as the code's own steps have it, and not on the diagonal."""
    weight = recipes.first_column_log_weight(8, 1000).exp()
    assert torch.allclose(weight, strided_weights(8, 1000).exp().float())
    assert torch.allclose(weight[:6, 0], torch.tensor(1e-3)) and weight[3, 3] == torch.tensor(1 / 7)
    with pytest.raises(ValueError, match=r"beta_tcvae_terms: project must be \"beta_tcvae\""):
        recipes.beta_tcvae_terms("factor_vae", *[torch.ones(3, 2)] * 3, 10)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_mmd(kernel):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(11, 5, dtype=torch.float64, generator=generator).requires_grad_()
    prior = torch.randn(11, 5, dtype=torch.float64, generator=generator)

    def k(a: Tensor, b: Tensor) -> Tensor:
        squares = torch.norm(a.unsqueeze(1) - b.unsqueeze(0), dim=-1) ** 2
        base = 2.0 * 5 * 0.7**2
        if kernel == "rbf":
            return torch.exp(-squares / base)
        return sum(s * base / (s * base + squares) for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0))

    own, priors = k(z, z), k(prior, prior)
    want = (own - own.diag().diag()).sum() / 110 + (priors - priors.diag().diag()).sum() / 110
    want = want - 2 * k(z, prior).sum() / 121
    got = recipes.mmd(z, prior, kernel=kernel, bandwidth=0.7)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(want, z))
    with pytest.raises(ValueError, match=r"mmd: kernel must be .*'laplace'"):
        recipes.mmd(z, prior, kernel="laplace")
    with pytest.raises(ValueError, match=r"mmd: z and prior_z must be of one shape"):
        recipes.mmd(z, prior[:5])


def test_mmd_keeps_its_digits_under_autocast():
    z, prior = noise((2, 64, 16)) + 5
    expected = recipes.mmd(z.double(), prior.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(recipes.mmd(z, prior).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(recipes.mmd(z, z), recipes.mmd(z, z.clone()))


@pytest.mark.parametrize(("batch", "dataset_size"), [(4, 2), (1, 5)])
def test_a_batch_that_the_stratified_weights_do_not_fit(batch, dataset_size):
    z = noise((batch, 3))
    with pytest.raises(ValueError, match=rf"at least 3 samples.* got {batch} and {dataset_size}"):
        recipes.beta_tcvae_terms("pythae", z, z, z, dataset_size)
