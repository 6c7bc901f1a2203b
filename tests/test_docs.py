"""The pages of docs/ and the README: their code runs, their figures are right, and the API leaves no name out."""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvae

ROOT = Path(__file__).resolve().parents[1]
PAGES = [p for p in sorted(ROOT.glob("docs/**/*.md")) if "```python" in p.read_text()]
# A page and the module without which its last sections cannot run: they belong to the slow tier.
SLOW = {"moving.md": ("diffusers", "scvi")}

pytestmark = pytest.mark.filterwarnings("ignore")  # other projects'


def blocks(path: Path) -> Iterator[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    text = path.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text[: match.start(1)].count("\n") + 1, match[1]


def run(path: Path, first: int, code: str, names: dict[str, Any]) -> None:
    """Runs a block. An expression with a figure, a shape or True behind it, in a comment, must have that value."""
    lines = code.splitlines()
    for node in ast.parse(code).body:
        where = f"{path.name}:{first + node.lineno - 1}"
        end = node.end_lineno or node.lineno
        comment = lines[end - 1][node.end_col_offset :].strip() if node.end_lineno else ""
        if isinstance(node, ast.Expr):
            value = eval(compile(ast.Expression(node.value), where, "eval"), names)
            compare(value, comment.removeprefix("#").strip(), where)
        else:
            exec(compile(ast.Module([node], []), where, "exec"), names)


def compare(value: Any, said: str, where: str) -> None:
    figure = re.fullmatch(r"(-?\d+(?:\.(\d+))?(?:e(-?\d+))?)", said.split("  ")[0].rstrip("."))
    if said == "infinity":
        assert math.isinf(value), f"{where}: {value}"
    elif figure:
        last = 10.0 ** (int(figure[3] or 0) - len(figure[2] or ""))
        assert float(value) == pytest.approx(float(figure[1]), abs=0.51 * last), where
    elif re.fullmatch(r"\[[\d, ]*\]", said):
        assert list(value.shape) == ast.literal_eval(said), where
    elif said.startswith(("True", "torch.")):
        assert str(value.item() if isinstance(value, Tensor) else value) == said, where


def share_noise(monkeypatch: pytest.MonkeyPatch, heavy: bool) -> None:
    """torch draws as fastvae does, so that before and after get the same noise from the same seed."""

    def normal(shape: Any, **_: Any) -> Tensor:
        zeros = torch.zeros(shape)
        return fastvae.reparameterize(zeros, zeros, return_eps=True)[1]

    monkeypatch.setattr(torch, "randn_like", lambda like, **_: normal(like.shape))
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", normal)
    if heavy:
        from diffusers.models.autoencoders import autoencoder_kl, vae

        monkeypatch.setattr(vae, "randn_tensor", normal)
        theirs = autoencoder_kl.DiagonalGaussianDistribution  # the page puts another in its place
        monkeypatch.setattr(autoencoder_kl, "DiagonalGaussianDistribution", theirs)


def weights(names: dict[str, Any]) -> dict[str, nn.Parameter]:
    modules = {name: m for name, m in names.items() if isinstance(m, nn.Module)}
    found = {f"{n}.{w}": p for n, m in modules.items() for w, p in m.named_parameters()}
    return found | {n: p for n, p in names.items() if isinstance(p, nn.Parameter)}


def outcome(names: dict[str, Any]) -> dict[str, Tensor]:
    """The loss of a block and the gradients of all weights in reach."""
    found = {"loss": names.pop("loss").detach()}
    for name, weight in weights(names).items():
        if weight.grad is not None:
            found[name], weight.grad = weight.grad, None
    return found


def run_page(
    path: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, heavy: bool = False
) -> int:
    """Runs a page's blocks in order; returns how many pairs of before and after it compared."""
    share_noise(monkeypatch, heavy)
    modules = SLOW.get(path.name, ())
    before: dict[str, Tensor] = {}
    pairs = 0
    for first, code in blocks(path):
        if any(f"import {m}" in code or f"from {m}" in code for m in modules) and not heavy:
            break
        kind = re.match(r"# (before|after)\b", code)
        if not kind:
            run(path, first, code, names)
            continue
        torch.manual_seed(1)
        run(path, first, code, names)
        if kind[1] == "before":
            before = outcome(names)
            continue
        after = outcome(names)
        assert before.keys() == after.keys(), f"{path.name}:{first}"
        largest = max(
            float(t.abs().max()) for n, t in before.items() if n != "loss" or len(before) == 1
        )
        for name, want in before.items():
            torch.testing.assert_close(
                after[name].to(want.dtype),
                want,
                rtol=2e-4,
                atol=1e-5 * largest,
                msg=lambda m, name=name, first=first: f"{path.name}:{first}: {name}: {m}",
            )
        pairs += 1
    return pairs


def step() -> dict[str, Any]:
    """What the two pages that begin with a training step take for granted."""
    names = {"torch": torch, "F": F, "sigma": 0.3, "x": torch.rand(16, 12)}
    return names | {"encoder": nn.Linear(12, 8), "decoder": nn.Linear(4, 12)}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT / "docs")))
def test_the_code_of_a_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = run_page(path, step() if path.name == "index.md" else {}, monkeypatch)
    assert pairs == {"index.md": 1, "moving.md": 6}.get(path.name, 0)


@pytest.mark.slow
def test_moving_from_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in SLOW["moving.md"]:
        pytest.importorskip(module, reason=f"{module} is not installed")
    assert run_page(ROOT / "docs" / "moving.md", {}, monkeypatch, heavy=True) == 8


def test_the_code_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_page(ROOT / "README.md", step(), monkeypatch) == 1


def test_figures_are_compared() -> None:
    for value, said in ((1.23, "1.2"), (1.0, "2"), (torch.ones(3), "[4]"), (False, "True")):
        if said == "1.2":
            compare(value, said, "here")
        else:
            with pytest.raises(AssertionError):
                compare(value, said, "here")


def test_links_of_the_readme() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert len(targets) > 10
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_every_public_name_is_in_the_api() -> None:
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    assert spec and spec.loader
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    text = "".join(conf.api_pages().values())
    modules = [n for n in fastvae.__all__ if isinstance(getattr(fastvae, n), type(fastvae))]
    names = [f"fastvae.{n}" for n in fastvae.__all__ if n not in (*modules, "__version__")]
    for module in modules:
        for name in getattr(fastvae, module).__all__:
            value = getattr(getattr(fastvae, module), name)
            if getattr(fastvae, name, None) is not value:
                names.append(f"fastvae.{module}.{name}")
    of_likelihoods = vars(fastvae.likelihoods).items()
    kinds = [
        n for n, v in of_likelihoods if isinstance(v, type) and v.__module__.endswith("likelihoods")
    ]
    names += [f"fastvae.likelihoods.{n}" for n in kinds if not n.startswith("_")]
    missing = [n for n in names if not re.search(rf":: {re.escape(n)}$", text, re.MULTILINE)]
    assert not missing
    assert set(conf.FORMULAS) <= set(names)
