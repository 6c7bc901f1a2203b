"""The command line: `info`, and above all that `verify` notices when an op is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fastvae
from fastvae.cli import main
from fastvae.verify import checks, oracle, problems
from fastvae.verify.accuracy import OUTPUTS, compare

COMMANDS = ("demo", "bench", "verify", "info")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"fastvae {command}" in capsys.readouterr().out


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fastvae", "--version"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["fastvae", fastvae.__version__]


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "info.json"
    assert main(["info", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    sections = json.loads(path.read_text())
    assert sections["fastvae"]["version"] == fastvae.__version__
    assert sections["fastvae"]["commit"]
    assert set(sections["built with"]) == {
        "compiler",
        "torch",
        "cuda",
        "cuda archs",
        "cpu kernels",
        "openmp",
    }
    assert sections["running on"]["torch"] == torch.__version__
    assert sections["running on"]["cpu kernels"] in sections["built with"]["cpu kernels"].split()
    for section in sections.values():
        assert all(name in printed and value in printed for name, value in section.items())


# verify: on a sound build ------------------------------------------------------------------------


FORMULAS = [
    f for f in torch.ops.fastvae.formulas() if not f.startswith("kl_") and f != "normal_log_prob"
]


def verify(tmp_path: Path, *args: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "verify.json"
    status = main(["verify", "--quick", "--json", str(path), *args])
    return status, json.loads(path.read_text())


def test_verify_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = verify(tmp_path)
    out = capsys.readouterr().out
    assert status == 0, out
    assert report["ok"] and all(check["ok"] for check in report["checks"])
    assert f"All {len(report['checks'])} checks hold" in out

    rounding = [c for c in report["checks"] if c["contract"] == "rounding"]
    dtypes = {"float32", "float64", "bfloat16", "float16"}
    for op, outputs in OUTPUTS.items():
        mine = [c for c in rounding if c["op"] == op]
        assert {c["dtype"] for c in mine} >= dtypes
        assert {c["case"].split(":")[0] for c in mine} >= set(outputs)
        if op != "reparameterize":
            some = ("kl_normal", "reconstruction_loss")
            for reduction in [r for r in checks.REDUCTIONS if r != "none" or op in some]:
                assert any(reduction in c["case"] for c in mine), (op, reduction)
        assert any(c["result"] == "gradient" for c in mine)
    for op in checks.FURTHER_OPS:
        mine = [c for c in report["checks"] if c["op"] == op and c["contract"] == "further ops"]
        assert {c["dtype"] for c in mine} >= {"float32", "float64"}
        assert {c["result"] for c in mine} == {"value", "gradient"}
    cases = " ".join(c["case"] for c in rounding)
    for name in (*FORMULAS, "latent", "channel", "free bits per element", "free bits per latent"):
        assert f" {name}," in cases or f" {name} " in cases, name
    mixed = {c["dtype"] for c in rounding if "/" in c["dtype"]}
    assert len(mixed) == 6
    assert {c["contract"] for c in report["checks"]} == set(checks.MEANING)


@pytest.mark.slow
def test_verify_holds_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0, capsys.readouterr().out


def test_verify_of_one_op(tmp_path: Path) -> None:
    status, report = verify(tmp_path, "--ops", "reparameterize")
    assert status == 0
    assert {c["op"] for c in report["checks"]} == {"reparameterize"}


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_verify_without_the_device(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--device", device]) == 2
    assert device in capsys.readouterr().err


# verify: on wrong ops ----------------------------------------------------------------------------

Op = Callable[..., Any]


def stratified_always(op: Op) -> Op:
    return lambda *args, estimator="stratified", **kwargs: op(*args, **kwargs)


def scaled(op: Op) -> Op:
    """Off by 25 to 50 units of float32."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = op(*args, **kwargs)
        if isinstance(result, tuple):
            return (result[0] * (1 + 3e-6), *result[1:])
        return result * (1 + 3e-6)

    return wrong


def scaled_gradient(op: Op, factor: float = 1.02) -> Op:
    """Right values; gradients off by 2%, five units of bfloat16."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        value = op(*args, **kwargs)
        return value.detach() + factor * (value - value.detach())

    return wrong


def rounded(op: Op) -> Op:
    """A result as narrow as 16-bit inputs."""
    return lambda mu, *args, **kwargs: op(mu, *args, **kwargs).to(mu.dtype)


def cancelling(op: Op) -> Op:
    """The expression as people write it."""

    def wrong(
        mu: Any,
        logvar: Any,
        mu_p: Any = 0.0,
        logvar_p: Any = 0.0,
        *,
        reduction: str = "sum",
        **rest: Any,
    ) -> Any:
        if rest or reduction == "latent":  # weights and free bits
            prior = (mu_p, logvar_p) if isinstance(mu_p, torch.Tensor) else ()
            return op(mu, logvar, *prior, reduction=reduction, **rest)
        d = logvar - logvar_p
        precision = torch.exp(0 * mu - logvar_p)
        value = -0.5 * (1 + d - (mu - mu_p).square() * precision - d.exp())
        value = value.to(torch.promote_types(mu.dtype, torch.float32))
        if reduction in ("none", "sample"):
            return value if reduction == "none" else value.flatten(1).sum(1)
        return value.sum() / {"sum": 1, "batchmean": len(mu), "mean": mu.numel()}[reduction]

    return wrong


def nan_hidden(op: Op) -> Op:
    return lambda *args, **kwargs: op(*args, **kwargs).nan_to_num(0.0)


def overflow_clamped(op: Op) -> Op:
    return lambda *args, **kwargs: op(*args, **kwargs).clamp(max=1e30)


def by_threads(op: Op) -> Op:
    """Something that depends on how the work is shared out, and is lost in rounding otherwise."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        value = op(*args, **kwargs)
        return value * (1 + torch.finfo(value.dtype).eps * (torch.get_num_threads() > 1))

    return wrong


def different_every_time(op: Op) -> Op:
    calls = iter(range(1 << 30))

    def wrong(*args: Any, **kwargs: Any) -> Any:
        value = op(*args, **kwargs)
        return value * (1 + torch.finfo(value.dtype).eps * (next(calls) % 3 == 0))

    return wrong


class _ScalesLaterBackwards(torch.autograd.Function):
    """What a node does that scales its saved gradients in place."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        ctx.passes = 0
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        ctx.passes += 1
        return grad * ctx.passes


def not_reentrant(op: Op) -> Op:
    return lambda *args, **kwargs: _ScalesLaterBackwards.apply(op(*args, **kwargs))


def half_forgotten(op: Op) -> Op:
    def wrong(*args: Any, likelihood: Any, **kwargs: Any) -> Any:
        return op(*args, likelihood="mse" if likelihood == "gaussian" else likelihood, **kwargs)

    return wrong


def beta_forgotten(op: Op) -> Op:
    return lambda *args, beta, **kwargs: op(*args, beta=1.0, **kwargs)


def kl_reduction_forgotten(op: Op) -> Op:
    return lambda *args, kl_reduction=None, **kwargs: op(*args, **kwargs)


def weight_forgotten(op: Op) -> Op:
    return lambda *args, weight=None, **kwargs: op(*args, **kwargs)


def free_bits_forgotten(op: Op) -> Op:
    return lambda *args, free_bits=0.0, **kwargs: op(*args, **kwargs)


def activation_forgotten(op: Op) -> Op:
    def wrong(*args: Any, likelihood: Any, **kwargs: Any) -> Any:
        if getattr(likelihood, "activation", None) == "tanh":
            likelihood = dataclasses.replace(likelihood, activation=None)
        return op(*args, likelihood=likelihood, **kwargs)

    return wrong


def sum_of_one_sample(op: Op) -> Op:
    """Gradients of parameters for each channel, a fifth of what they are."""

    def wrong(*args: Any, likelihood: Any, **kwargs: Any) -> Any:
        for parameter in getattr(likelihood, "parameters", ()):
            if parameter.dim() and parameter.shape[0] == 1:
                likelihood = pytree.tree_map(
                    lambda t: t.detach() + (t - t.detach()) / 5, likelihood
                )
        return op(*args, likelihood=likelihood, **kwargs)

    return wrong


def gradient_from_z(op: Op) -> Op:
    """The gradient of logvar as 0.5 g (z - mu), which cancels when sigma << |mu|."""

    def wrong(mu: Any, logvar: Any, *, return_eps: bool = False, **kwargs: Any) -> Any:
        fixed = logvar.detach()
        z, eps = op(mu, fixed, return_eps=True, **kwargs)
        by_logvar = 0.5 * (z - mu).detach() * (logvar - fixed)
        return (z + by_logvar, eps) if return_eps else z + by_logvar

    return wrong


def own_noise(op: Op) -> Op:
    """Ignores the generator."""

    def wrong(mu: Any, *args: Any, eps: Any = None, generator: Any = None, **kwargs: Any) -> Any:
        return op(mu, *args, eps=torch.randn_like(mu) if eps is None else eps, **kwargs)

    return wrong


def same_noise_for_all(op: Op) -> Op:
    """What a draw that ignores the sample's index does."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        z, kl = op(*args, **kwargs)
        return z[:1].expand_as(z), kl

    return wrong


def wide_posterior(op: Op) -> Op:
    """Another variance."""
    return lambda parameters, logvar=None: op(parameters * (1 + 3e-6), logvar)


WRONG = [
    ("kl_normal", scaled, "rounding"),
    ("kl_normal", scaled_gradient, "rounding"),
    ("kl_normal", rounded, "rounding"),
    ("kl_normal", cancelling, "near the prior"),
    ("kl_normal", nan_hidden, "NaN and infinity"),
    ("kl_normal", overflow_clamped, "NaN and infinity"),
    ("kl_normal", by_threads, "same bits"),
    ("kl_normal", different_every_time, "same bits"),
    ("kl_normal", not_reentrant, "same bits"),
    ("reparameterize", scaled, "rounding"),
    ("reparameterize", gradient_from_z, "rounding"),
    ("reparameterize", own_noise, "rounding"),
    ("sample_and_kl", same_noise_for_all, "rounding"),
    ("reconstruction_loss", half_forgotten, "rounding"),
    ("reconstruction_loss", weight_forgotten, "rounding"),
    ("reconstruction_loss", activation_forgotten, "rounding"),
    ("reconstruction_loss", sum_of_one_sample, "rounding"),
    ("kl_normal", weight_forgotten, "rounding"),
    ("kl_normal", free_bits_forgotten, "rounding"),
    ("vae_loss", weight_forgotten, "rounding"),
    ("vae_loss", free_bits_forgotten, "rounding"),
    ("reconstruction_loss", nan_hidden, "NaN and infinity"),
    ("vae_loss", beta_forgotten, "rounding"),
    ("mixture_log_prob", scaled, "further ops"),
    ("kl_decomposition", stratified_always, "further ops"),
    ("vae_loss", kl_reduction_forgotten, "rounding"),
    ("aggregate_posterior", scaled, "further ops"),
    ("kl_multivariate_normal", scaled, "further ops"),
    ("kl_multivariate_normal", scaled_gradient, "further ops"),
    ("kl_multivariate_normal", nan_hidden, "NaN and infinity"),
    ("sample_and_kl_multivariate_normal", scaled, "further ops"),
    ("iwae_loss", scaled, "further ops"),
    ("iwae_loss", scaled_gradient, "further ops"),
    ("kl_divergence", scaled, "further ops"),
    ("DiagonalGaussian", wide_posterior, "further ops"),
]


@pytest.mark.parametrize(
    "op, make_wrong, contract", WRONG, ids=[f"{op}-{wrong.__name__}" for op, wrong, _ in WRONG]
)
def test_verify_notices(
    op: str,
    make_wrong: Callable[[Op], Op],
    contract: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fastvae, op, make_wrong(getattr(fastvae, op)))
    status, report = verify(tmp_path, "--ops", op)
    out = capsys.readouterr().out
    assert status == 1
    assert not report["ok"]
    broken = {c["contract"] for c in report["checks"] if not c["ok"]}
    assert contract in broken
    assert "BROKEN" in out and "What that means" in out and checks.MEANING[contract] in out


@pytest.mark.parametrize("formula", FORMULAS)
def test_verify_notices_a_gradient(formula: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every likelihood, and every input and parameter of it."""

    def failed() -> tuple[int, int]:
        found = problems.likelihoods(
            "reconstruction_loss", (3, 2, 40), torch.float32, torch.device("cpu"), ("none",)
        )
        mine = [p for p in found if p.case.split(",")[0] == formula]
        found = [c for p in mine for c in checks.rounding(p) if c.result == "gradient"]
        return sum(not c.ok for c in found), len(found)

    assert failed()[0] == 0
    op = fastvae.reconstruction_loss
    monkeypatch.setattr(fastvae, "reconstruction_loss", scaled_gradient(op, 1 + 1e-4))
    bad, count = failed()
    assert bad == count > 0


def wrong_normals(wrong: Callable[[torch.Tensor, int], torch.Tensor]) -> Op:
    right = fastvae.random.philox_normal

    def philox_normal(*size: int, start: int = 0, **kwargs: Any) -> torch.Tensor:
        return wrong(right(*size, start=start, **kwargs), start)

    return philox_normal


@pytest.mark.parametrize(
    "wrong, case",
    [
        (lambda eps, start: eps * 1.02, "variance"),
        (lambda eps, start: eps + 0.02, "mean"),
        (lambda eps, start: eps.clamp(-3, 3), "kurtosis"),
        (lambda eps, start: eps + 0.1 * eps.flatten().roll(1).view_as(eps), "neighbours"),
        (lambda eps, start: eps * (1 + 1e-5 * (start > 2**34)), "Box-Muller of its words"),
        (lambda eps, start: -eps, "the ops draw it"),
    ],
)
def test_verify_notices_noise(
    wrong: Any, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastvae.random, "philox_normal", wrong_normals(wrong))
    status, report = verify(tmp_path, "--ops", "noise")
    assert status == 1
    assert case in {c["case"] for c in report["checks"] if not c["ok"]}


def test_verify_notices_other_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, key, answer = oracle.KNOWN_ANSWERS[0]
    wrong = (counter, key, [*answer[:3], answer[3] ^ 1])
    monkeypatch.setattr(oracle, "KNOWN_ANSWERS", [wrong])
    status, report = verify(tmp_path, "--ops", "noise")
    assert status == 1
    assert [c["case"] for c in report["checks"] if not c["ok"]] == ["Philox's known answers"]


# verify: its measure and its truths --------------------------------------------------------------


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def measured(got: torch.Tensor, want: float, **how: Any) -> Any:
    return compare(got, oracle.real([want]), **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, 1024.0, 2.0**-10])
def test_a_neighbour_is_one_unit_away(value: float, dtype: torch.dtype) -> None:
    near = torch.tensor([value * (1 + torch.finfo(dtype).eps)], dtype=dtype)
    assert measured(near, value).error == 1
    assert measured(torch.tensor([value], dtype=dtype), value).error == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_limit_is_some_units_or_twice_the_plain_error(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    results = {units: torch.tensor([1 + units * eps], dtype=dtype) for units in (3, 4, 5, 6, 7)}
    assert measured(results[4], 1.0).ok and not measured(results[5], 1.0).ok
    assert measured(results[6], 1.0, plain=results[3]).ok
    assert not measured(results[7], 1.0, plain=results[3]).ok
    assert measured(results[7], 1.0, units=16).ok


def test_units_below_the_smallest_normal_number() -> None:
    smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    subnormal = torch.tensor([3 * smallest], dtype=torch.float16)
    assert measured(subnormal, 2 * smallest).error == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_wrong(value: float) -> None:
    result = torch.tensor([value])
    for plain in (None, result):
        assert measured(result, 1.0, plain=plain).error == math.inf
        assert not measured(result, 1.0, plain=plain).ok
    assert measured(result, value).ok
    assert not measured(torch.tensor([1.0]), value).ok


def test_what_overflows_the_dtype_is_infinite() -> None:
    assert measured(torch.tensor([math.inf], dtype=torch.float16), 1e6).ok
    assert not measured(torch.tensor([65504.0], dtype=torch.float16), 1e6).ok


def test_another_shape_is_wrong() -> None:
    assert not measured(torch.ones(2), 1.0).ok


def test_a_nan_breaks_a_check() -> None:
    check = checks.Check("rounding", "kl_normal", "", "float32", math.nan, 4.0, "units")
    assert not check.ok
    assert check.strain == math.inf
