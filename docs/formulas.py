r"""The formulas of the API, typeset: in help() they stand as text.

`conf.py` puts each below the first paragraph of the docstring. Write \frac{1}{2}: docutils reads \frac12 as 12 over what follows.
"""

_KL = r"\operatorname{KL}\left(q \,\|\, p\right)"

FORMULAS = {
    # The objective
    "fastvae.reparameterize": r"z = \mu + \sigma\,\varepsilon, \qquad \sigma = e^{\frac{1}{2} \mathrm{logvar}}, \qquad \varepsilon \sim \mathcal N(0, 1)",
    "fastvae.kl_normal": _KL
    + r" = \frac{1}{2} \left(\frac{\sigma^2}{\sigma_p^2} - 1 - \log\frac{\sigma^2}{\sigma_p^2} + \frac{(\mu - \mu_p)^2}{\sigma_p^2}\right)",
    "fastvae.vae_loss": r"\mathrm{loss} = \mathrm{recon} + \beta\,\mathrm{kl}",
    # Divergences
    "fastvae.kl_divergence": _KL + r" = \mathbb E_{z \sim q}\left[\log q(z) - \log p(z)\right]",
    "fastvae.kl_multivariate_normal": r"\operatorname{KL}\left(\mathcal N(\mu, T T^\top) \,\|\, \mathcal N(0, I)\right) = \frac{1}{2} \sum_i \mu_i^2 + \frac{1}{2} \sum_{i > j} T_{ij}^2 + \sum_i \left(\frac{T_{ii}^2 - 1}{2} - \log T_{ii}\right)",
    "fastvae.sample_and_kl_multivariate_normal": r"z = \mu + T \varepsilon, \qquad \varepsilon \sim \mathcal N(0, I)",
    # Pairs
    "fastvae.mixture_log_prob": r"\log p(z) = \log \sum_k w_k \prod_l \mathcal N\left(z_l;\, \mu_{kl}, \sigma_{kl}^2\right)",
    "fastvae.aggregate_posterior": r"q(z) = \frac{1}{N} \sum_{n=1}^{N} q(z \mid x_n)",
    "fastvae.kl_decomposition": r"\mathbb E\left[\log\frac{q(z \mid x)}{p(z)}\right] = \mathbb E\left[\log\frac{q(z \mid x)}{q(z)}\right] + \mathbb E\left[\log\frac{q(z)}{\prod_l q(z_l)}\right] + \mathbb E\left[\sum_l \log\frac{q(z_l)}{p(z_l)}\right]",
    # Importance weights
    "fastvae.importance_log_weight": r"\log w = \log p(x \mid z) + \log p(z) - \log q(z \mid x)",
    "fastvae.iwae_loss": r"-\log \frac{1}{K} \sum_{k=1}^{K} w_k",
    # Single samples of the KL
    "fastvae.normal_log_prob": r"\log \mathcal N(z; \mu, \sigma^2) = -\frac{1}{2} \left(\frac{(z - \mu)^2}{\sigma^2} + \log \sigma^2 + \log 2\pi\right)",
    "fastvae.kl_one_sample": r"\log q(z) - \log p(z), \qquad z \sim q",
    # Likelihoods
    "fastvae.likelihoods.SquaredError": r"\delta^2, \qquad \delta = \mathrm{mean} - x",
    "fastvae.likelihoods.Gaussian": r"\frac{1}{2} \left(\frac{\delta^2}{\sigma^2} + \log \sigma^2\right), \qquad \sigma^2 = e^{\mathrm{logvar}}",
    "fastvae.likelihoods.L1": r"\lvert \delta \rvert",
    "fastvae.likelihoods.Laplace": r"\frac{\lvert \delta \rvert}{b} + \log b, \qquad b = e^{\mathrm{log\_scale}}",
    "fastvae.likelihoods.Huber": r"\begin{cases} \frac{1}{2} \delta^2 & \lvert \delta \rvert \le d \\ d \left(\lvert \delta \rvert - \frac{1}{2} d\right) & \lvert \delta \rvert > d \end{cases}",
    "fastvae.likelihoods.Charbonnier": r"\sqrt{\delta^2 + \varepsilon^2}",
    "fastvae.likelihoods.StudentT": r"\frac{\nu + 1}{2} \log\left(1 + \frac{z^2}{\nu}\right) + \log b, \qquad z = \frac{\delta}{b}, \quad b = e^{\mathrm{log\_scale}}, \quad \nu = \mathrm{df}",
    "fastvae.likelihoods.Bernoulli": r"-x \log p - (1 - x) \log(1 - p), \qquad p = \frac{1}{1 + e^{-l}}",
    "fastvae.likelihoods.ContinuousBernoulli": r"\log\frac{e^l - 1}{l} - l x",
    "fastvae.likelihoods.Poisson": r"e^l - x\,l \; \left[\,+ \log x!\,\right]",
    "fastvae.likelihoods.NegativeBinomial": r"-\log\left[\frac{\Gamma(\theta + x)}{\Gamma(\theta)\, x!} \left(\frac{\theta}{\theta + \mu}\right)^{\theta} \left(\frac{\mu}{\theta + \mu}\right)^{x}\right]",
    "fastvae.likelihoods.LogisticMixture": r"-\log \sum_{k=1}^{K} \pi_k \prod_{c} \left[S\left(\frac{x_c + h - \mu_{kc}}{s_{kc}}\right) - S\left(\frac{x_c - h - \mu_{kc}}{s_{kc}}\right)\right], \qquad S(t) = \frac{1}{1 + e^{-t}}",
    "fastvae.likelihoods.optimal_gaussian": r"\frac{N}{2} \left(\log \mathrm{MSE} + 1 + \log 2\pi\right)",
    # Others
    "fastvae.recipes.effective_beta": r"\mathrm{objective} \propto \frac{1}{2}\,\frac{\mathrm{SSE}}{B} + \beta_{\mathrm{eff}}\,\frac{\mathrm{KL}}{B}",
    "fastvae.recipes.mmd": r"\frac{\sum_{i \ne j} k(z_i, z_j) + \sum_{i \ne j} k(z'_i, z'_j)}{B (B - 1)} - \frac{2 \sum_{i, j} k(z_i, z'_j)}{B^2}",
    "fastvae.schedules.Capacity": r"\gamma \lvert \mathrm{KL} - C \rvert",
}
