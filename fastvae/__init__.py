"""fastvae: fused kernels for the objective of variational autoencoders.

from fastvae import reparameterize, vae_loss

z = reparameterize(mu, logvar)
loss, recon, kl = vae_loss(decoder(z), x, mu, logvar, beta=2 * sigma**2)
"""

from functools import partial as _partial
from importlib.metadata import version as _version

from fastvae import (
    diagnostics,
    distributions,
    likelihoods,
    nn,
    random,
    recipes,
    reference,
    schedules,
)
from fastvae.densities import kl_one_sample, normal_log_prob
from fastvae.divergences import kl_divergence
from fastvae.functional import (
    VAELossOutput,
    kl_normal,
    reconstruction_loss,
    reparameterize,
    sample_and_kl,
    vae_loss,
)
from fastvae.functional import refuse_torchscript as _refuse_torchscript
from fastvae.importance import importance_log_weight, iwae_loss
from fastvae.multivariate import kl_multivariate_normal, sample_and_kl_multivariate_normal
from fastvae.pairwise import aggregate_posterior, kl_decomposition, mixture_log_prob
from fastvae.posterior import DiagonalGaussian

__version__ = _version("fastvae-kernels")

__all__ = [
    "DiagonalGaussian",
    "VAELossOutput",
    "__version__",
    "aggregate_posterior",
    "diagnostics",
    "distributions",
    "importance_log_weight",
    "iwae_loss",
    "kl_decomposition",
    "kl_divergence",
    "kl_multivariate_normal",
    "kl_normal",
    "kl_one_sample",
    "likelihoods",
    "mixture_log_prob",
    "nn",
    "normal_log_prob",
    "random",
    "recipes",
    "reconstruction_loss",
    "reference",
    "reparameterize",
    "sample_and_kl",
    "sample_and_kl_multivariate_normal",
    "schedules",
    "vae_loss",
]

for _name in __all__:
    if callable(_f := globals()[_name]) and not isinstance(_f, type):
        # torch.jit.script calls this before it reads a function.
        _f.__prepare_scriptable__ = _partial(_refuse_torchscript, _name)
