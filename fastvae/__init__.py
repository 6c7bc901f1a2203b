"""fastvae: fused kernels for the objective of variational autoencoders.

from fastvae import reparameterize, vae_loss

z = reparameterize(mu, logvar)
loss, recon, kl = vae_loss(decoder(z), x, mu, logvar, beta=2 * sigma**2)
"""

from importlib.metadata import version as _version

from fastvae import distributions, likelihoods, nn, random, recipes, reference
from fastvae.functional import (
    VAELossOutput,
    kl_normal,
    reconstruction_loss,
    reparameterize,
    sample_and_kl,
    vae_loss,
)
from fastvae.pairwise import aggregate_posterior, kl_decomposition, mixture_log_prob

__version__ = _version("fastvae")

__all__ = [
    "VAELossOutput",
    "__version__",
    "aggregate_posterior",
    "distributions",
    "kl_decomposition",
    "kl_normal",
    "likelihoods",
    "mixture_log_prob",
    "nn",
    "random",
    "recipes",
    "reconstruction_loss",
    "reference",
    "reparameterize",
    "sample_and_kl",
    "vae_loss",
]
