"""The modules do what the functions do, and behave as modules."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import latents, random_state, vae_inputs

from fastvae import VAELossOutput, reparameterize, vae_loss
from fastvae.likelihoods import Gaussian, Laplace
from fastvae.nn import Reparameterize, VAELoss

OPTIONS = [
    {},
    {"beta": 0.25},
    {"beta": 4.0, "likelihood": "gaussian", "reduction": "sum"},
    {"reduction": "mean", "kl_reduction": "batchmean"},
    {"reduction": "sample"},
    {"likelihood": Laplace(-0.7, activation="sigmoid"), "free_bits": 0.5},
    {"reduction": "mean", "free_bits": 0.5, "free_bits_per": "element"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vae_loss_is_the_function(options):
    tensors = vae_inputs((4, 30))
    got, expected = VAELoss(**options)(**tensors), vae_loss(**tensors, **options)
    assert isinstance(got, VAELossOutput)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    positional = VAELoss(**options)(*tensors.values())
    assert all(torch.equal(a, b) for a, b in zip(positional, expected, strict=True))


def test_vae_loss_takes_its_options_in_the_documented_order():
    tensors = vae_inputs((4, 30))
    weight = torch.rand(4, 1)
    got = VAELoss(0.25, "gaussian", "sum", "mean", 0.5, "element")(*tensors.values(), weight)
    expected = vae_loss(
        **tensors,
        beta=0.25,
        likelihood="gaussian",
        reduction="sum",
        kl_reduction="mean",
        free_bits=0.5,
        free_bits_per="element",
        weight=weight,
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("number", [float, int, np.float64, np.float32, np.array], ids=str)
def test_beta_may_be_annealed(number):
    tensors = vae_inputs((4, 30))
    module = VAELoss(beta=number(0.0))
    for beta in (0.0, 0.5, 1.0):
        module.beta = number(beta)
        got = module(**tensors).loss
        assert torch.equal(got, vae_loss(**tensors, beta=number(beta)).loss)


def test_beta_is_saved_and_restored():
    """A resumed training goes on with the beta that it had."""
    saved = torch.nn.Sequential(VAELoss(0.0))
    saved[0].beta = 0.375
    resumed = torch.nn.Sequential(VAELoss(0.0))
    resumed.load_state_dict(saved.state_dict())
    assert resumed[0].beta.item() == 0.375
    resumed.load_state_dict({})  # a checkpoint from before beta was a buffer
    assert resumed[0].beta.item() == 0.375


def test_beta_keeps_its_digits_where_a_module_changes_its_dtype():
    module = torch.nn.Sequential(VAELoss(1e-8), torch.nn.Linear(2, 2))
    for convert in ("half", "bfloat16", "double"):
        getattr(module, convert)()
        assert module[0].beta.dtype == torch.float32 and module[0].beta.item() == pytest.approx(
            1e-8
        )
    assert module.to("meta")[0].beta.is_meta


def test_beta_as_a_tensor():
    tensors = vae_inputs((4, 30))
    module = VAELoss(beta=torch.tensor(0.5))
    assert torch.equal(module(**tensors).loss, vae_loss(**tensors, beta=0.5).loss)


def test_vae_loss_trains():
    tensors = {k: t.requires_grad_() for k, t in vae_inputs((4, 30)).items()}
    VAELoss(0.3)(**tensors).loss.backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in tensors.values())


def test_a_learned_scale_is_the_modules_parameter():
    tensors = vae_inputs((4, 30))
    log_scale = torch.nn.Parameter(torch.tensor(0.25))
    module = VAELoss(likelihood=Laplace(log_scale))
    assert dict(module.named_parameters()) == {"log_scale": log_scale}
    module(**tensors).loss.backward()
    (want,) = torch.autograd.grad(
        vae_loss(**tensors, likelihood=Laplace(log_scale)).loss, log_scale
    )
    assert torch.equal(log_scale.grad, want)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(**tensors).loss, log_scale)
    torch.testing.assert_close(got, want)

    # Whatever takes the parameter's place is used: a copy's, a checkpoint's, functional_call's.
    want = vae_loss(**tensors, likelihood=Laplace(-1.5)).loss
    saved = {"log_scale": torch.tensor(-1.5)}
    for assign in (False, True):
        other = copy.deepcopy(module)
        other.load_state_dict(saved, assign=assign)
        torch.testing.assert_close(other(**tensors).loss, want)
    torch.testing.assert_close(torch.func.functional_call(module, saved, kwargs=tensors).loss, want)
    assert log_scale.item() == 0.25

    module.likelihood = "mse"
    assert list(module.parameters()) == []
    assert torch.equal(module(**tensors).loss, vae_loss(**tensors).loss)


def test_a_likelihoods_tensors_move_with_the_module():
    tensors = vae_inputs((4, 30))
    logvar = torch.linspace(-1, 1, 30)
    module = VAELoss(likelihood=Gaussian(logvar))
    assert set(module.state_dict()) == {"beta"}
    got = module.double()(**{name: t.double() for name, t in tensors.items()}).loss
    want = vae_loss(**tensors, likelihood=Gaussian(logvar)).loss
    torch.testing.assert_close(got.float(), want)
    assert module.to("meta").logvar.is_meta


@pytest.mark.parametrize("module", [VAELoss(0.25, "gaussian"), Reparameterize("mean")], ids=repr)
def test_modules_are_plain_citizens(module):
    assert list(module.parameters()) == []
    assert set(module.state_dict()) <= {"beta"}
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)


def test_repr_tells_the_options():
    assert repr(VAELoss(0.25, "gaussian")) == (
        "VAELoss(beta=0.25, likelihood='gaussian', reduction='batchmean', kl_reduction=None)"
    )
    assert repr(VAELoss(free_bits=0.5)).endswith(", free_bits=0.5, free_bits_per='latent')")
    assert repr(Reparameterize("mean")) == "Reparameterize(eval_mode='mean')"


@pytest.mark.parametrize("eval_mode", ["sample", "mean"])
def test_reparameterize_samples_in_training(eval_mode):
    mu, logvar = latents((4, 30)).values()
    torch.manual_seed(5)
    z = Reparameterize(eval_mode).train()(mu, logvar)
    torch.manual_seed(5)
    assert torch.equal(z, reparameterize(mu, logvar))


def test_reparameterize_in_eval():
    mu, logvar = latents((4, 30)).values()
    torch.manual_seed(5)
    z = Reparameterize().eval()(mu, logvar)
    torch.manual_seed(5)
    assert torch.equal(z, reparameterize(mu, logvar)), 'the default is "sample"'
    state = random_state()
    assert torch.equal(Reparameterize("mean").eval()(mu, logvar), mu)
    assert torch.equal(random_state(), state)


def test_a_loss_made_on_the_meta_device():
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(2, 2), VAELoss(0.5))
    assert "meta" in repr(module)
    module.to_empty(device="cpu").load_state_dict(
        torch.nn.Sequential(torch.nn.Linear(2, 2), VAELoss(0.25)).state_dict()
    )
    assert float(module[1].beta) == 0.25
    assert repr(module[1]) == repr(VAELoss(0.25))
