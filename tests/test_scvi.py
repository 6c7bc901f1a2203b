"""fastvae.distributions against scvi-tools' and torch's, and SCVI trained with `recipes.scvi` and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributions as D

import fastvae
from fastvae import distributions, recipes


def made(kind: type, shape: tuple[int, ...] = (6, 5), **options: Any) -> tuple[Any, Tensor]:
    """With a theta of the last dimension, and values."""
    torch.manual_seed(0)
    tensors = {"mu": torch.randn(shape).exp(), "theta": torch.randn(shape[-1:]).exp()}
    if kind.__name__ == "ZeroInflatedNegativeBinomial":
        tensors["zi_logits"] = torch.randn(shape)
    tensors = {k: t.requires_grad_() for k, t in tensors.items()}
    value = torch.poisson(tensors["mu"].detach() * torch.rand(shape) * 2)
    return kind(**tensors, **options), value


KINDS = [distributions.NegativeBinomial, distributions.ZeroInflatedNegativeBinomial]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def as_torch(one: Any) -> D.NegativeBinomial:
    return D.NegativeBinomial(one.theta.double(), logits=torch.log(one.mu / one.theta).double())


@EVERY_KIND
def test_log_prob_mean_and_variance(kind):
    one, value = made(kind)
    plain = as_torch(one)
    log_p, mean, variance = plain.log_prob(value), plain.mean, plain.variance
    if kind is distributions.ZeroInflatedNegativeBinomial:
        pi = torch.sigmoid(one.zi_logits.double())
        log_p = torch.log(pi * (value == 0) + (1 - pi) * log_p.exp())
        mean, variance = (1 - pi) * mean, (1 - pi) * (variance + pi * mean**2)
    options = {"check_dtype": False, "rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(one.log_prob(value), log_p, **options)
    torch.testing.assert_close(one.mean, mean, **options)
    torch.testing.assert_close(one.variance, variance, **options)
    torch.testing.assert_close(one.log_prob(value.int()), one.log_prob(value))
    stacked = torch.stack([value, value + 1])
    torch.testing.assert_close(one.log_prob(stacked)[0], one.log_prob(value))
    assert one.batch_shape == value.shape and one.event_shape == ()


@EVERY_KIND
def test_expanded(kind):
    one, value = made(kind)
    wide = one.expand((3, *one.batch_shape))
    assert wide.batch_shape == (3, *value.shape)
    torch.testing.assert_close(wide.log_prob(value)[2], one.log_prob(value))
    events = D.Independent(one, 1).expand((3, len(value)))
    torch.testing.assert_close(events.log_prob(value)[1], one.log_prob(value).sum(1))


@EVERY_KIND
def test_samples(kind):
    one, _ = made(kind)
    torch.manual_seed(3)
    drawn = one.sample((40_000,))
    assert drawn.shape == (40_000, 6, 5) and not drawn.requires_grad
    assert one.support.check(drawn).all()
    error = drawn.var(0).div(len(drawn)).sqrt()
    assert ((drawn.mean(0) - one.mean).abs() < 5 * error).all()
    fourth = ((drawn - one.mean) ** 4).mean(0)
    assert ((drawn.var(0) - one.variance).abs() < 5 * (fourth / len(drawn)).sqrt()).all()
    assert one.sample().shape == (6, 5)


@EVERY_KIND
def test_a_shared_theta_stays_small(kind):
    """[G] beside a mu of [B, G]: what log_prob keeps for its backward pass has no other [B, G] than mu, value and logits."""
    one, value = made(kind)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = one.log_prob(value).sum()
    assert [t.shape for t in kept if t.shape == (5,)]
    assert not [t for t in kept if t.shape == value.shape and t.stride(0) == 0]
    assert torch.autograd.grad(loss, one._theta)[0].shape == (5,)


def test_total_count_with_logits_or_probs():
    count, logits = torch.tensor([0.5, 2.0]), torch.randn(3, 2)
    one = distributions.NegativeBinomial(total_count=count, logits=logits)
    other = distributions.NegativeBinomial(total_count=count, probs=torch.sigmoid(logits))
    value = torch.tensor([[0.0, 3.0]]).expand(3, 2)
    want = D.NegativeBinomial(count, logits=logits).log_prob(value)
    for got in (one, other):
        torch.testing.assert_close(got.log_prob(value), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.get_normalized("scale").sum(-1), torch.ones(3))


def test_what_makes_no_sense():
    t = torch.ones(2)
    for bad in (
        {},
        {"mu": t},
        {"theta": t},
        {"total_count": t},
        {"mu": t, "theta": t, "logits": t},
    ):
        with pytest.raises(ValueError, match=r"NegativeBinomial: give mu and theta"):
            distributions.NegativeBinomial(**bad)
    with pytest.raises(ValueError, match="zi_logits"):
        distributions.ZeroInflatedNegativeBinomial(mu=t, theta=t)
    with pytest.raises(ValueError, match="key"):
        distributions.NegativeBinomial(mu=t, theta=t).get_normalized("rate")
    with pytest.raises(ValueError, match="mu"):
        distributions.NegativeBinomial(mu=-t, theta=t, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        distributions.NegativeBinomial(mu=t, theta=t, validate_args=True).log_prob(-t)
    assert distributions.NegativeBinomial(mu=t, theta=t).log_prob(-t).isnan().all()


def test_all_arguments_broadcast():
    one, zeros = torch.ones(3), torch.zeros(5, 3, dtype=torch.float64)
    inflated = distributions.ZeroInflatedNegativeBinomial(mu=one, theta=one, zi_logits=zeros)
    assert inflated.batch_shape == inflated.sample().shape == (5, 3)
    assert inflated.log_prob(one.double()).shape == (5, 3)
    assert inflated.log_prob(one.double()).dtype == torch.float32


# Against scvi-tools itself


@pytest.fixture
def scvi() -> Any:
    return pytest.importorskip("scvi")


@pytest.mark.slow
@EVERY_KIND
def test_is_scvis(kind, scvi):
    one, value = made(kind)
    arguments = {"mu": one.mu, "theta": one._theta}
    if kind is distributions.ZeroInflatedNegativeBinomial:
        arguments["zi_logits"] = one.zi_logits
    theirs = getattr(scvi.distributions, kind.__name__)(**arguments)
    torch.testing.assert_close(one.log_prob(value), theirs.log_prob(value), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.mean, theirs.mean)
    torch.testing.assert_close(one.variance, theirs.variance)


def losses(scvi: Any, steps: int = 50, **options: Any) -> list[float]:
    from anndata import AnnData

    rng = np.random.default_rng(0)
    types = rng.integers(0, 4, 512)
    mean = rng.gamma(0.3, 2.0, (4, 120))[types] * rng.gamma(8, 1 / 8, (512, 1))
    counts = rng.poisson(mean * rng.gamma(2.0, 0.5, mean.shape)).astype(np.float32)
    adata = AnnData(counts, {"batch": (np.arange(512) % 2).astype(str)})
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata, **options)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)
    found: list[float] = []
    torch.manual_seed(1)
    model.module.train()
    while len(found) < steps:
        for tensors in model._make_data_loader(adata=adata, batch_size=128):
            _, _, out = model.module(tensors, loss_kwargs={"kl_weight": len(found) / steps})
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            found.append(out.loss.item())
    return found[:steps]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb"])
def test_scvi_trains_as_before(gene_likelihood, dispersion, scvi):
    options = {"gene_likelihood": gene_likelihood, "dispersion": dispersion}
    theirs = scvi.distributions.NegativeBinomial, torch.distributions.kl_divergence
    plain = losses(scvi, **options)
    with recipes.scvi():
        fused = losses(scvi, **options)
        assert scvi.distributions.NegativeBinomial is fastvae.distributions.NegativeBinomial
    assert plain[-1] < 0.97 * plain[0]
    np.testing.assert_allclose(fused, plain, rtol=1e-6)
    assert (scvi.distributions.NegativeBinomial, torch.distributions.kl_divergence) == theirs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_whole_training(scvi):
    """model.train(), and what is done with a model after it."""
    from anndata import AnnData

    rng = np.random.default_rng(0)
    adata = AnnData(rng.negative_binomial(2, 0.5, (200, 30)).astype(np.float32))
    scvi.model.SCVI.setup_anndata(adata)
    with recipes.scvi():
        model = scvi.model.SCVI(adata, n_hidden=16, gene_likelihood="zinb")
        model.train(max_epochs=3, accelerator="cpu", enable_progress_bar=False)
        assert np.isfinite(float(model.get_elbo()))
        assert model.posterior_predictive_sample(n_samples=2).shape == (200, 30, 2)
        assert model.get_normalized_expression().shape == (200, 30)
        assert set(model.get_likelihood_parameters()) == {"mean", "dispersions", "dropout"}
