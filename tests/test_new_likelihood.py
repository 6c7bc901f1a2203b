"""CONTRIBUTING's example of a new likelihood, added to a copy of the repository, built and tested there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def put_before(path: Path, mark: str, text: str) -> None:
    source = path.read_text()
    assert source.count(mark) == 1, f"{path.name} has no single {mark!r}"
    path.write_text(source.replace(mark, text + mark))


def run(*command: str, cwd: Path) -> str:
    env = os.environ | {"FASTVAE_CUDA": "0", "PYTHONPATH": str(cwd)}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_example_of_contributing(tmp_path):
    for folder in ("csrc", "fastvae", "tests"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a likelihood")[1]
    formula, plain, oracle, row = re.findall(r"```(?:cpp|python)\n(.*?)```", section, re.DOTALL)[:4]

    formulas = tmp_path / "csrc/formulas"
    (formulas / "log_cosh.h").write_text(formula)
    put_before(formulas / "list.h", '#include "poisson.h"\n', '#include "log_cosh.h"\n')
    put_before(formulas / "list.h", "  visit(Huber) ", "  visit(LogCosh) \\\n")
    # The other likelihoods take minutes to compile.
    listed = (formulas / "list.h").read_text()
    few = re.sub(r"visit\((?!Kl|Normal|LogCosh|SquaredError|UnitGaussian)\w+\)", "", listed)
    (formulas / "list.h").write_text(few)
    python = tmp_path / "fastvae/likelihoods.py"
    put_before(python, "_NAMED: dict", plain + "\n\n")
    put_before(python, '    "l1": L1(),\n', '    "log_cosh": LogCosh(),\n')
    put_before(tmp_path / "fastvae/verify/oracle.py", "LIKELIHOODS = {\n", oracle + "\n\n")
    put_before(
        tmp_path / "fastvae/verify/oracle.py", '    "L1": l1,\n', '    "LogCosh": log_cosh,\n'
    )
    put_before(tmp_path / "fastvae/verify/likelihoods.py", "# fmt: on\n", row + "\n")

    run("setup.py", "--quiet", "build_ext", "--inplace", cwd=tmp_path)
    tests = ("tests/test_likelihoods.py", "tests/test_likelihoods_fused.py")
    out = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "log_cosh", *tests, cwd=tmp_path
    )
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed[1]) > 100, out[-2000:]
