"""What ``fastvae bench`` and the pytest-benchmark suite measure; benchmarks/README.md has the method.

`cases` says what is timed, `baselines` what stands beside fastvae (`jax_baselines` for JAX), `models` has whole training
steps, `check` holds every result against float64, `devices` knows how a device is timed, `run` puts a run together, and
`report` and `plots` show it.
"""
