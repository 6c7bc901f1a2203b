"""What ``fastvae bench`` and the pytest-benchmark suite measure; benchmarks/README.md has the method."""
