"""``fastvae bench``: that what is timed is right, that what is wrong is noticed, and that the figures are what they say.

No time is asserted anywhere.
"""

from __future__ import annotations

import csv
import itertools
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvae import recipes, reference
from fastvae.cli import main

for module in ("matplotlib", "pandas", "tabulate", "cpuinfo"):
    pytest.importorskip(module, reason="the bench extra is not installed")

from fastvae.bench import cases, models, report, run  # noqa: E402
from fastvae.bench.cases import BACKWARD, BOTH, FORWARD, PASSES, Case, Timed  # noqa: E402
from fastvae.bench.run import Device  # noqa: E402

ROOT = Path(__file__).parents[1]
KL = cases.latent("kl_normal", (4, 9))
SAMPLE = cases.latent("reparameterize", (50, 100))
SMALL = cases.objective("vae_loss", (6, (5, 7), (3,)))
# Those that take seconds in float64 are left to a run, and to the slow tests.
QUICK = [c for c in cases.all_cases() if c.elements < 1 << 21 and c.leaves[0].shape[0] < 1000]


def wrong(case: Case, function: Any) -> str:
    return case.wrong(case.start()("eager", lambda _: function))


# Right results, and wrong ones --------------------------------------------------------------------


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_every_implementation_is_right(case: Case) -> None:
    for name, function in case.functions.items():
        if name == "scvi-tools":
            pytest.importorskip("scvi", reason="scvi-tools is not installed")
        assert not wrong(case, function), name


def test_the_plain_decomposition_is_the_reference() -> None:
    """It is the truth of its own case, whose reference would take too long."""
    z, mu, logvar = cases.decomposition(6, 4).inputs()
    found = cases.kl_decomposition(z, mu, logvar, 1000)
    torch.testing.assert_close(found, reference.kl_decomposition(z, mu, logvar, 1000))


@pytest.mark.parametrize("case", [c for c in QUICK if c.elements < 1 << 20], ids=str)
def test_jax_is_right(case: Case) -> None:
    jax_baselines = pytest.importorskip(
        "fastvae.bench.jax_baselines", reason="the jax extra is not installed", exc_type=ImportError
    )
    if case.name.removesuffix(": eps given") not in jax_baselines.FUNCTIONS:
        assert case.suite in ("likelihoods", "terms", "pairs")
        return
    beside = case.start()("eager")
    made = jax_baselines.Jax(case, beside.inputs, beside.upstream)
    assert not case.wrong(made)
    for which in {*case.passes} - {BACKWARD}:
        timed = made.timed(which)
        assert timed.foreign
        timed.call(timed.setup())


def wrong_scale(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.randn_like(mu) * torch.exp(logvar)  # sigma squared


def wrong_noise(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.rand_like(mu) * torch.exp(0.5 * logvar)


def no_gradient_of_logvar(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.randn_like(mu) * torch.exp(0.5 * logvar.detach()) + 0 * logvar


def kl_by_elements(mu: Tensor, logvar: Tensor) -> Tensor:
    return reference.kl_normal(mu, logvar) / mu.shape[1]


def detached_gradient(recon_x: Tensor, x: Tensor) -> Tensor:
    loss = reference.reconstruction_loss(recon_x, x)
    return loss.detach() + 1.01 * (loss - loss.detach())


def own_in_the_first_column(*inputs: Tensor) -> Tensor:
    mi, tc, dim = recipes.beta_tcvae_terms("pythae", *inputs, cases.DATASET_SIZE)
    return mi + 6 * tc + dim


def overflowing(recon_x: Tensor, x: Tensor) -> Tensor:
    return (recon_x * 1e30 - x).square().sum()


WRONG = [
    ("reparameterize", wrong_scale, "off by"),
    ("reparameterize", wrong_noise, "mean"),
    ("reparameterize", no_gradient_of_logvar, "gradient 1"),
    ("kl_normal", kl_by_elements, "gradient 0"),
    ("reconstruction_loss", detached_gradient, "gradient 0"),
    ("kl_decomposition", own_in_the_first_column, "gradient 0"),
    ("reconstruction_loss", overflowing, "inf"),
]


@pytest.mark.parametrize("op, function, what", WRONG, ids=[f.__name__ for _, f, _ in WRONG])
def test_what_is_wrong_is_found(op: str, function: Any, what: str) -> None:
    assert what in wrong(next(c for c in QUICK if c.op == op), function)


@pytest.mark.parametrize("case", [c for c in QUICK if c.suite in ("likelihoods", "terms")], ids=str)
def test_a_wrong_value_is_found(case: Case) -> None:
    def off(*inputs: Tensor) -> Any:
        outputs = case.functions["fastvae"](*inputs)
        return (outputs[0], 1.01 * outputs[1]) if isinstance(outputs, tuple) else 1.01 * outputs

    assert wrong(case, off)


def test_noise_is_checked() -> None:
    for function in SAMPLE.functions.values():
        assert not wrong(SAMPLE, function)
    wide = lambda mu, logvar: mu + 1.2 * torch.randn_like(mu) * torch.exp(0.5 * logvar)  # noqa: E731
    assert "variance" in wrong(SAMPLE, wide)


def test_a_wrong_baseline_is_reported_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    functions = KL.functions | {"distributions": kl_by_elements}
    status, found = small_run(monkeypatch, tmp_path, replace(KL, functions=functions))
    assert status == 1
    assert {r["baseline"] for r in found["rows"]} == {"fastvae", "fastvae-again", "eager"}
    (left_out,) = (item for item in found["left_out"] if item["wrong"])
    assert left_out["baseline"] == "distributions"
    captured = capsys.readouterr()
    assert "WRONG, not timed" in captured.out and "1 results are wrong" in captured.err


@pytest.mark.parametrize(
    "error, status", [(RuntimeError("broken"), 1), (MemoryError("out of memory"), 0)]
)
def test_a_failing_implementation_ends_no_run(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(*_: Tensor) -> Tensor:
        raise error

    functions = KL.functions | {"fastvae": failing}
    got, found = small_run(monkeypatch, tmp_path, replace(KL, functions=functions))
    assert got == status
    assert {r["baseline"] for r in found["rows"]} == {"eager", "distributions"}
    assert all(r["speedup"] is None for r in found["rows"])


def test_an_entry_that_fails_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = replace(KL, leaves=[])
    status, found = small_run(monkeypatch, tmp_path, broken, SAMPLE)
    assert status == 1
    assert {r["op"] for r in found["rows"]} == {"reparameterize"}
    assert [i["what"] for i in found["left_out"] if i["wrong"]] == [str(broken)]


# What a run says ----------------------------------------------------------------------------------


def small_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *chosen: Any, options: tuple[str, ...] = ()
) -> tuple[int, dict[str, Any]]:
    """A run of the command with these cases alone, each timed for as short as can be."""
    entries = [replace(entry, compiled=False) for entry in chosen]
    monkeypatch.setattr(run, "plan", lambda *_: entries)
    monkeypatch.setattr(run, "SECONDS", 0.01)
    monkeypatch.setattr(run, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setitem(sys.modules, "fastvae.bench.jax_baselines", None)
    path = tmp_path / "bench.json"
    status = main(["bench", "--json", str(path), *options])
    return status, json.loads(path.read_text())


def test_a_run_writes_all_it_should(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = models.Model("step: tiny", lambda w: models.mlp(16, w, 4), (16, 16), (8, 16))
    growth = [cases.growing(1 << n) for n in (8, 10)]
    chosen = [SMALL, cases.latent("sample_and_kl", (8, 400)), *growth, step]
    folder = tmp_path / "some" / "machine"
    options = ("--results", str(folder))
    status, found = small_run(monkeypatch, tmp_path, *chosen, options=options)
    assert status == 0
    about = found["machine"]
    assert about["copy_bandwidth"] > 0 and about["noise"]["rows"] > 0 and int(about["threads"]) > 0
    assert "--results" in about["command"]
    eager = {}
    for row in found["rows"]:
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert row["device"] == "cpu" and row["peak_bytes"] > 0
        key = tuple(row[k] for k in report.KEYS)
        eager |= {key: row} if row["baseline"] == "eager" else {}
    for row in found["rows"]:
        if row["baseline"] == "fastvae":
            other = eager[tuple(row[k] for k in report.KEYS)]
            assert row["speedup"] == 1
            assert other["speedup"] == other["median"] / row["median"]
            if row["bytes"]:
                expected = row["bytes"] / row["median"] / about["copy_bandwidth"]
                assert row["bandwidth_fraction"] == pytest.approx(expected)
    assert {r["pass"] for r in found["rows"]} == {*PASSES, "step"}

    assert json.loads((folder / "results.json").read_text())["rows"] == found["rows"]
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["median"]) for r in rows] == [r["median"] for r in found["rows"]]
    page = (folder / "README.md").read_text()
    assert about["commit"] in page and "torch " + torch.__version__ in page
    assert page.index("## Training steps") < page.index("## Ops")
    for picture in report.PLOTS:
        assert f"]({picture})" in page
        assert 1000 < (folder / picture).stat().st_size < 200_000
    printed = capsys.readouterr().out
    assert "objective, eager" in printed and "copy bandwidth" in printed and "tiny" in printed


def test_bytes_are_those_of_the_design() -> None:
    """N of recon_x and M of mu in values; see the table in benchmarks/README.md."""
    n, m = 10 * 6, 10 * 4
    size = (10, (6,), (4,))
    assert cases.objective("vae_loss", size).least_bytes(BOTH) == 4 * (3 * n + 4 * m)
    assert cases.latent("reparameterize", (10, 4)).least_bytes(BOTH) == 4 * 6 * m
    assert cases.latent("sample_and_kl", (10, 4)).least_bytes(BOTH) == 4 * 8 * m
    narrow = cases.objective("vae_loss", size, torch.float16)
    assert narrow.least_bytes(FORWARD) == 2 * (2 * n + 2 * m)
    assert narrow.least_bytes(BACKWARD) == 2 * (3 * n + 4 * m)
    assert narrow.least_bytes(BOTH) == 2 * (5 * n + 6 * m)
    assert cases.latent("reparameterize", (10, 4), eps=True).least_bytes(FORWARD) == 4 * 4 * m


def test_memory_is_what_is_allocated() -> None:
    device = Device("cpu")

    def call(count: int) -> Tensor:
        for _ in range(3):
            torch.empty(5 * count)  # freed at once: held once at most, and more than is returned
        return torch.empty(2 * count)

    timed = Timed(call, lambda: 1 << 16)
    assert device.peak_bytes(timed) == 4 * 5 * (1 << 16)
    fused = cases.objective("vae_loss", (64, (1000,), (10,))).start()("fastvae")
    peak = device.peak_bytes(fused.timed(BOTH))
    gradients = 4 * (64 * 1000 + 2 * 64 * 10)
    assert peak is not None and gradients <= peak <= gradients + 100


def test_rounds_call_all_in_an_order_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[float] = []

    def time(device: Device, timed: Timed) -> float:
        order.append(timed.call(None))
        return order[-1]

    monkeypatch.setattr(Device, "time", time)
    timed = {str(i): Timed(lambda _, i=i: float(i)) for i in range(3)}  # type: ignore[misc]
    times = run.interleave(Device("cpu"), timed, 0)
    assert times == {str(i): [float(i)] * run.LEAST_ROUNDS for i in range(3)}
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == run.WARM_UP + run.LEAST_ROUNDS
    assert all(sorted(r) == [0, 1, 2] for r in rounds)
    for i in range(3):  # whoever comes before it in a round or at the end of the last
        assert len({before for before, after in itertools.pairwise(order) if after == i}) > 1


def test_medians_and_fifths(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0]
    monkeypatch.setattr(run, "interleave", lambda *_: {"fastvae": values})
    monkeypatch.setattr(Device, "peak_bytes", lambda *_: 7)
    monkeypatch.setattr(Device, "copy_bandwidth", lambda _: 1e9)
    found = run.run(Device("cpu"), [replace(KL, passes=(BOTH,), compiled=False)], 0)
    (row,) = found.rows
    assert (row["median"], row["rounds"], row["peak_bytes"]) == (4.0, 7, 7)
    assert (row["p20"], row["p80"]) == pytest.approx((2.2, 5.8))


def test_a_budget_shortens_rows_then_drops_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lengths, device = [0.0], [], Device("cpu")
    monkeypatch.setattr(Device, "copy_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])

    def measure(_: Any, entry: Case, seconds: float) -> None:
        lengths.append(seconds)
        now[0] += run.fixed_cost(entry) + seconds  # just as estimated, of one pass

    monkeypatch.setattr(run.Run, "measure", measure)
    entries = [cases.growing(1 << n) for n in (8, 12, 16, 20)]
    fixed = sum(map(run.fixed_cost, entries))

    def lengths_in(seconds: float | None) -> tuple[list[float], list[str]]:
        now[0] = 0.0
        lengths.clear()
        left_out = run.run(device, entries, 1.0, seconds).left_out
        return list(lengths), [item["what"] for item in left_out if item["what"] != "all"]

    assert lengths_in(None) == ([1.0] * 4, [])
    got, left_out = lengths_in(fixed + 2.0)
    assert not left_out and got == pytest.approx([0.5] * 4)
    got, left_out = lengths_in(fixed - 1.0)  # less than is needed besides the rows
    assert got == pytest.approx([run.SHORTEST] * 3)
    assert left_out == [str(entries[-1])]


@pytest.mark.slow
def test_a_sigmoid_is_compiled_with_either_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "COPY_BYTES", {"cpu": 1 << 20})
    found = run.run(Device("cpu"), [next(cases.sigmoid_cases())], 0.01)
    assert {"fastvae", "eager", "compile", "fastvae-compile"} <= {r["baseline"] for r in found.rows}


@pytest.mark.parametrize("quick", [True, False])
def test_plan_has_every_op_once(quick: bool) -> None:
    device = Device("cpu")
    entries = run.plan(device, quick)
    assert len({(e.suite, str(e)) for e in entries}) == len(entries)
    assert {e.suite for e in entries} <= set(report.SUITES)
    assert quick or {e.op for e in entries} == set(run.OPS)
    for op in run.OPS:
        chosen = run.plan(device, quick, [op])
        assert chosen and {e.op for e in chosen} == {op}


# Whole steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fastvae", "eager"])
def test_steps_are_right_and_train(kind: str) -> None:
    model = models.mlp(12, 16, 3)
    step = models.Step(model, torch.rand(8, 12), kind)
    assert step.wrong() == ""
    before = [p.detach().clone() for p in model.parameters()]
    assert step().isfinite()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(step.timed(BOTH).call(None)) == 3


def test_a_wrong_objective_is_found_in_a_step() -> None:
    def halved(kind: str, y: Tensor, x: Tensor, z: Tensor, *q: Tensor) -> Tensor:
        ops = models.OPS[kind]
        beta = 0.5 if kind == "eager" else 1.0
        return ops.vae_loss(y, x, *q, beta=beta).loss

    model = models.mlp(12, 16, 3)
    model.objective = halved
    assert "off by" in models.Step(model, torch.rand(8, 12), "eager").wrong()


@pytest.mark.parametrize("model", models.MODELS, ids=str)
@pytest.mark.slow
def test_models_are_right(model: models.Model) -> None:
    if "SCVI" in model.name:
        pytest.importorskip("scvi", reason="scvi-tools is not installed")
    x = model.x(torch.randn(4, *model.batch[1:]))
    made = model.build(model.widths[0])
    for kind in ("fastvae", "eager"):
        step = models.Step(made, x, kind)
        assert step.wrong() == ""
        assert all(t.isfinite().all() for t in step.timed(BOTH).call(None))


# The command --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense"])
def test_a_device_without_benchmarks(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", device]) == 2
    assert device in capsys.readouterr().err


def test_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--seconds", "0"]) == 1
    captured = capsys.readouterr()
    assert "no time was left" in captured.out and "nothing was timed" in captured.err


def test_an_unknown_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--ops", "nothing"]) == 2
    assert "vae_loss" in capsys.readouterr().err


MISSING_EXTRAS = """
import sys
from fastvae.cli import main
sys.modules["tabulate"] = None
assert main(["bench"]) == 1
"""


def test_a_missing_extra_is_named() -> None:
    ran = subprocess.run([sys.executable, "-c", MISSING_EXTRAS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "tabulate" in ran.stderr and "pip install matplotlib" in ran.stderr


@pytest.mark.slow
def test_as_users_run_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastvae", "bench", "--quick", "--results", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert {"fastvae", "eager", "functional", "distributions", "compile"} <= {
        r["baseline"] for r in found["rows"]
    }
    assert {r["suite"] for r in found["rows"]} == {"ops", "growth", "steps"}
    assert {p.name for p in tmp_path.glob("*.png")} == set(report.PLOTS)


# What is published --------------------------------------------------------------------------------


def test_the_readme_says_what_the_results_say() -> None:
    publish = runpy.run_path(str(ROOT / "benchmarks" / "publish.py"))
    for path, text in publish["pages"](publish["stored"]()).items():
        assert path.read_text() == text, f"{path} is stale: run `make results`"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("*/results.json")), ids=str
)
def test_published_figures_carry_their_machine(path: Path) -> None:
    about = json.loads(path.read_text())["machine"]
    readme, page = (ROOT / name for name in ("README.md", "docs/speed.md"))
    for key in ("torch", "commit", "date", "python", "command"):
        assert about[key] and about[key] in page.read_text()
        assert about[key] in readme.read_text() or key in ("python", "command")
    assert "+changes" not in about["commit"]
