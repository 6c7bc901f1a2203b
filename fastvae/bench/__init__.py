"""What ``fastvae bench`` and the pytest-benchmark suite measure; benchmarks/README.md has the method.

`cases` and `models` say what is timed beside what and hold each result against float64, `jax_baselines` has JAX's part, `timing`
times and counts memory on a device, `run` puts a run together, `report` shows it.
"""
