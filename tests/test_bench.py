"""``fastvae bench``: that what is timed is right, that what is wrong is noticed, and that the figures are what they say.

No time is asserted anywhere.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvae import recipes
from fastvae.cli import main

MISSING = "the bench extra is not installed"
for module in ("rich", "matplotlib", "cpuinfo"):
    pytest.importorskip(module, reason=MISSING)

from fastvae.bench import baselines, cases, check, devices, models, plots, report, run  # noqa: E402
from fastvae.bench.baselines import Timed, Torch  # noqa: E402
from fastvae.bench.cases import BACKWARD, BOTH, FORWARD, Case  # noqa: E402

ROOT = Path(__file__).parents[1]
SMALL = [
    Case(op, 6, *sizes, dtype, given)
    for op, sizes, givens in (
        ("vae_loss", ((5, 7), (3,)), (False,)),
        ("reconstruction_loss", ((5, 7), ()), (False,)),
        ("kl_normal", ((), (13,)), (False,)),
        ("reparameterize", ((), (500,)), (False, True)),
        ("sample_and_kl", ((), (500,)), (False, True)),
    )
    for given in givens
    for dtype in cases.DTYPES
]
AFTER_SIGMOID = Case("vae_loss", 6, (5, 7), (3,), after_sigmoid=True)
SMALL.append(AFTER_SIGMOID)
PAIRS = [
    Case("kl_decomposition", 6, latent=(4,), components=6),
    Case("mixture_log_prob", 7, latent=(3,), components=5),
]
LIKELIHOODS = cases.likelihood_cases((6, (5, 7), ()))
MACHINE = ("cpu", "threads", "gpu", "torch", "cuda", "python", "commit", "date", "copy_bandwidth")
ROW = (
    *("op", "shape", "dtype", "device", "pass", "baseline", "median", "p20", "p80", "bytes"),
    *("bandwidth_fraction", "speedup", "peak_bytes", "launches"),
)


def problem(case: Case, function: Any) -> str | None:
    inputs = case.inputs()
    upstream = case.upstream(inputs)
    return check.wrong(case, inputs, upstream, *Torch(function, inputs, upstream).results())


# Right results, and wrong ones --------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL + LIKELIHOODS + PAIRS, ids=str)
def test_every_implementation_is_right(case: Case) -> None:
    for name, function in baselines.functions(case).items():
        assert problem(case, function) is None, name


JAX_CASES = [*SMALL, Case("noise", 1, (), (5000,))]
JAX_QUICK = [
    c for c in JAX_CASES if c.op in ("vae_loss", "sample_and_kl") and c.dtype is torch.float32
]
JAX = [
    pytest.param(c, id=str(c), marks=[pytest.mark.slow] * (c not in JAX_QUICK)) for c in JAX_CASES
]


@pytest.mark.parametrize("case", JAX)
def test_jax_is_right(case: Case) -> None:
    jax_baselines = pytest.importorskip(
        "fastvae.bench.jax_baselines", reason="the jax extra is not installed", exc_type=ImportError
    )
    inputs = case.inputs()
    upstream = case.upstream(inputs)
    jax = jax_baselines.Jax(case, inputs, upstream)
    assert check.wrong(case, inputs, upstream, *jax.results()) is None
    for which in case.passes:
        timed = jax.timed(which)
        assert timed.host_clock and timed.peak_bytes >= 0
        timed.call(timed.setup())


def test_slices_of_the_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SLICE", 60)
    for case in SMALL[:1] + [c for c in SMALL if c.op == "sample_and_kl"][:1] + PAIRS:
        for function in baselines.functions(case).values():
            assert problem(case, function) is None
    assert problem(SMALL[0], lambda *inputs: 1.01 * baselines.vae_loss(*inputs)) is not None


def wrong_scale(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.randn_like(mu) * torch.exp(logvar)  # sigma squared


def wrong_noise(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.rand_like(mu) * torch.exp(0.5 * logvar)


def no_gradient_of_logvar(mu: Tensor, logvar: Tensor) -> Tensor:
    return mu + torch.randn_like(mu) * torch.exp(0.5 * logvar.detach()) + 0 * logvar


def kl_by_elements(mu: Tensor, logvar: Tensor) -> Tensor:
    return baselines.kl_normal(mu, logvar) / mu.shape[1]


def detached_gradient(recon_x: Tensor, x: Tensor) -> Tensor:
    loss = baselines.reconstruction_loss(recon_x, x)
    return loss.detach() + 1.01 * (loss - loss.detach())


def own_in_the_first_column(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    return recipes.beta_tcvae_terms("pythae", z, mu, logvar, cases.DATASET_SIZE)


def overflowing(recon_x: Tensor, x: Tensor) -> Tensor:
    return (recon_x * 1e30 - x).square().sum()


WRONG = [
    ("reparameterize", wrong_scale, "gradient 1"),
    ("reparameterize", wrong_noise, "mean"),
    ("reparameterize", no_gradient_of_logvar, "gradient 1"),
    ("kl_normal", kl_by_elements, "gradient 0"),
    ("reconstruction_loss", detached_gradient, "gradient 0"),
    ("kl_decomposition", own_in_the_first_column, "output 0"),
    ("reconstruction_loss", overflowing, "inf"),
]


@pytest.mark.parametrize("op, function, what", WRONG, ids=[f.__name__ for _, f, _ in WRONG])
def test_what_is_wrong_is_found(op: str, function: Any, what: str) -> None:
    case = next(c for c in SMALL + PAIRS if c.op == op)
    found = problem(case, function)
    assert found is not None and what in found


@pytest.mark.parametrize("case", LIKELIHOODS, ids=str)
def test_a_wrong_likelihood_is_found(case: Case) -> None:
    function = baselines.functions(case)["fastvae"]
    assert problem(case, lambda *inputs: 1.01 * function(*inputs)) is not None


def test_noise_is_checked() -> None:
    case = Case("noise", 1, (), (5000,))
    for function in baselines.functions(case).values():
        assert problem(case, function) is None
    assert "variance" in str(problem(case, lambda mu, logvar: 1.2 * torch.randn_like(mu)))


def test_a_wrong_baseline_is_reported_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(baselines.FUNCTIONS["kl_normal"], "distributions", kl_by_elements)
    status, found = small_run(monkeypatch, tmp_path, Case("kl_normal", 4, (), (9,)))
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

    monkeypatch.setitem(baselines.FUNCTIONS["kl_normal"], "fastvae", failing)
    got, found = small_run(monkeypatch, tmp_path, Case("kl_normal", 4, (), (9,)))
    assert got == status
    assert {r["baseline"] for r in found["rows"]} == {"eager", "distributions"}
    assert all(r["speedup"] is None for r in found["rows"])


def test_an_entry_that_fails_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interleave = run.interleave

    def failing(device: Any, timed: Any, seconds: float, cold: bool = False) -> Any:
        if "distributions" in timed:
            raise ValueError("something else")
        return interleave(device, timed, seconds, cold)

    monkeypatch.setattr(run, "interleave", failing)
    chosen = Case("kl_normal", 4, (), (9,)), Case("noise", 1, (), (5000,))
    status, found = small_run(monkeypatch, tmp_path, *chosen)
    assert status == 1
    assert {r["op"] for r in found["rows"]} == {"noise"}
    assert [i["reason"] for i in found["left_out"] if i["wrong"]] == ["ValueError: something else"]


# What a run says ----------------------------------------------------------------------------------


def small_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *chosen: Case, options: tuple[str, ...] = ()
) -> tuple[int, dict[str, Any]]:
    """A run of the command with these cases alone, each timed for as short as can be."""
    entries = [
        run.Entry("ops", case, passes=case.passes, compiled=False, jax=False) for case in chosen
    ]
    monkeypatch.setattr(run, "plan", lambda *_: list(entries))
    monkeypatch.setattr(run, "SECONDS", 0.01)
    monkeypatch.setattr(devices, "COPY_BYTES", {"cpu": 1 << 20})
    path = tmp_path / "bench.json"
    status = main(["bench", "--json", str(path), *options])
    return status, json.loads(path.read_text())


def test_a_run_writes_all_it_should(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [Case("vae_loss", 8, (12,), (3,)), Case("sample_and_kl", 8, (), (40,))]
    folder = tmp_path / "some" / "machine"
    options = ("--results", str(folder), "--csv", str(tmp_path / "rows.csv"))
    status, found = small_run(monkeypatch, tmp_path, *chosen, options=options)
    assert status == 0
    assert set(MACHINE) <= set(found["machine"])
    assert found["machine"]["copy_bandwidth"] > 0
    assert "--results" in found["machine"]["command"]
    for row in found["rows"]:
        assert tuple(row)[: len(ROW)] == ROW
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert row["device"] == "cpu" and row["launches"] is None
    for group in report.groups(found["rows"]):
        assert group["fastvae"]["speedup"] == 1
        eager = group["eager"]
        assert eager["speedup"] == eager["median"] / group["fastvae"]["median"]
        if eager["bytes"]:
            expected = eager["bytes"] / eager["median"] / found["machine"]["copy_bandwidth"]
            assert eager["bandwidth_fraction"] == pytest.approx(expected)
        else:
            assert eager["bandwidth_fraction"] is None
    assert {r["pass"] for r in found["rows"]} == set(cases.PASSES)

    assert report.read_json(folder / "results.json")["rows"] == found["rows"]
    for path in (folder / "results.csv", tmp_path / "rows.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [float(r["median"]) for r in rows] == [r["median"] for r in found["rows"]]
    page = (folder / "README.md").read_text()
    assert found["machine"]["commit"] in page and "torch " + torch.__version__ in page
    for picture in ("speedup.png", "memory.png"):
        assert f"]({picture})" in page
        assert 1000 < (folder / picture).stat().st_size < 200_000
    printed = capsys.readouterr().out
    assert "x eager" in printed and "copy bandwidth" in printed and "about" in printed


def test_bytes_are_those_of_the_design() -> None:
    """N of recon_x and M of mu in values; see the table in benchmarks/README.md."""
    n, m = 10 * 6, 10 * 4
    both = {"vae_loss": 3 * n + 4 * m, "reparameterize": 6 * m, "sample_and_kl": 8 * m}
    for op, values in both.items():
        case = Case(op, 10, (6,) if op == "vae_loss" else (), (4,))
        assert case.least_bytes(BOTH) == 4 * values
    narrow = Case("vae_loss", 10, (6,), (4,), torch.float16)
    assert narrow.least_bytes(FORWARD) == 2 * (2 * n + 2 * m)
    assert narrow.least_bytes(BACKWARD) == 2 * (3 * n + 4 * m)
    assert narrow.least_bytes(BOTH) == 2 * (5 * n + 6 * m)
    given = Case("reparameterize", 10, (), (4,), eps_given=True)
    assert given.least_bytes(FORWARD) == 4 * 4 * m
    # What is written for good is never more than the whole.
    for case in cases.op_cases():
        for which in case.passes:
            assert case.least_bytes(which) >= 0


def test_memory_is_what_is_allocated() -> None:
    device = devices.Cpu()

    def call(count: int) -> Tensor:
        for _ in range(3):
            torch.empty(
                5 * count
            )  # freed at once: held once at most, and more than what is returned
        return torch.empty(2 * count)

    timed = Timed(call, lambda: 1 << 16)
    assert device.memory_and_launches(timed) == (4 * 5 * (1 << 16), None)
    case = Case("vae_loss", 64, (1000,), (10,))
    inputs = case.inputs()
    fused = Torch(baselines.functions(case)["fastvae"], inputs, case.upstream(inputs))
    peak, _ = device.memory_and_launches(fused.timed(BOTH))  # type: ignore[arg-type]
    gradients = 4 * (64 * 1000 + 2 * 64 * 10)
    assert gradients <= peak <= gradients + 100


def test_kernels_are_counted_alone() -> None:
    categories = ["kernel", "gpu_memcpy", "gpu_user_annotation", "cpu_op", "kernel", "gpu_memset"]
    assert devices.kernels_of([{"cat": c} for c in categories] + [{"name": "kernel"}]) == 2


class Clock:
    """A device on which a call takes the seconds that it returns."""

    gpu = None
    modes: dict[str, str | None] = {"compile": None}  # noqa: RUF012
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.order: list[float] = []

    def time(self, timed: Timed, cold: bool = False) -> float:
        seconds = float(timed.call(timed.setup()))
        self.order.append(seconds)
        return seconds

    def memory_and_launches(self, timed: Timed) -> tuple[int | None, int | None]:
        return 7, 3

    def free_bytes(self) -> int | None:
        return None

    def release(self) -> None:
        pass


def test_rounds_call_all_in_an_order_of_their_own() -> None:
    clock = Clock()
    timed = {str(i): Timed(lambda _, i=i: i) for i in range(3)}  # type: ignore[misc]
    times = run.interleave(clock, timed, 0)
    assert times == {str(i): [float(i)] * run.ROUNDS[0] for i in range(3)}
    called = clock.order[9:]  # three calls of each to warm up
    rounds = [tuple(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert all(sorted(r) == [0, 1, 2] for r in rounds)
    for i in range(3):  # whoever comes before it in a round or at the end of the last
        assert len({before for before, after in itertools.pairwise(called) if after == i}) > 1


def test_medians_and_fifths() -> None:
    values = iter([9.0, 9.0, 9.0, 5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0])
    entry = run.Entry("ops", Case("kl_normal", 2, (), (3,)))
    (row,) = run._rows(Clock(), entry, {"fastvae": Timed(lambda _: next(values))}, 0, "op", BOTH)
    assert (row.median, row.rounds, row.peak_bytes, row.launches) == (4.0, 7, 7, 3)
    assert (row.p20, row.p80) == pytest.approx((2.2, 5.8))


def test_a_budget_shortens_rows_then_drops_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "copy_bandwidth", lambda _: [1e9])
    now = [0.0]
    lengths: list[float] = []

    def measure(device: Any, entry: run.Entry, seconds: float) -> tuple[list[Any], list[Any]]:
        lengths.append(seconds)
        now[0] += entry.fixed("cpu", 1) + seconds * entry.timings  # just as estimated
        return [], []

    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(run, "_measure_case", measure)
    device = devices.Cpu()
    entries = [run.Entry("growth", cases.growing(1 << n), compiled=False) for n in (8, 12, 16, 20)]
    whole = run.estimate(entries, device, 1.0)

    def lengths_in(seconds: float | None) -> tuple[list[float], list[str]]:
        now[0] = 0.0
        lengths.clear()
        left_out = run.run(device, entries, 1.0, seconds).left_out
        return list(lengths), [item.what for item in left_out]

    assert lengths_in(None) == ([1.0] * 4, [])
    got, left_out = lengths_in(whole - 2.0)
    assert not left_out and got == pytest.approx([0.5] * 4)
    got, left_out = lengths_in(whole - 4.0 - 1.0)  # less than is needed besides the rows
    assert got == pytest.approx([run.SHORTEST] * 3)
    assert left_out == [str(entries[-1])]


def test_no_time_left_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "COPY_BYTES", {"cpu": 1 << 20})
    entries = [run.Entry("ops", Case("kl_normal", 2, (), (3,)), compiled=False)]
    result = run.run(devices.Cpu(), entries, 0.01, seconds=1e-9)
    assert not result.rows and "no time" in result.left_out[0].reason


@pytest.mark.slow
def test_a_sigmoid_is_compiled_with_either_objective() -> None:
    entry = run.Entry("compiled", AFTER_SIGMOID, passes=(BOTH,), jax=False)
    result = run.run(devices.Cpu(), [entry], 0.01)
    assert not result.left_out
    rows = {row.baseline: row for row in result.rows}
    assert {"fastvae", "eager", "compile", "fastvae-compile"} <= rows.keys()
    assert {row.op for row in rows.values()} == {"sigmoid, vae_loss"}


def test_sizes_that_do_not_fit_into_memory_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    device = devices.Cpu()
    monkeypatch.setattr(device, "free_bytes", lambda: 1 << 20)
    kept, dropped = run.that_fit(run.plan(device), device)
    assert any("memory" in item.reason for item in dropped)
    assert max(e.case.pixels for e in kept) < 1 << 18


@pytest.mark.parametrize("quick", [True, False])
def test_plan_has_every_op_once(quick: bool) -> None:
    entries = run.plan(devices.Cpu(), quick)
    assert len({(e.suite, str(e)) for e in entries}) == len(entries)
    if not quick:
        assert {e.case.op for e in entries} == set(cases.OPS)
        assert {e.suite for e in entries} <= set(report.SUITES)
    for op in cases.OPS:
        chosen = run.plan(devices.Cpu(), quick, [op])
        assert chosen and {e.case.op for e in chosen} == {op}


# Whole steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["fastvae", "eager"])
def test_steps_are_right_and_train(objective: str) -> None:
    torch.manual_seed(0)
    step = models.Step(models.mlp(12, 16, 3), torch.rand(8, 12), objective, compiled=False)
    assert step.wrong() == ""
    before = [p.detach().clone() for p in step.parameters]
    assert step().isfinite()
    assert all(not torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))


def test_a_wrong_objective_is_found_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(*inputs: Tensor) -> Tensor:
        return baselines.reconstruction_loss(*inputs[:2]) + 0.5 * baselines.kl_normal(*inputs[2:])

    monkeypatch.setitem(baselines.FUNCTIONS["vae_loss"], "eager", halved)
    step = models.Step(models.mlp(12, 16, 3), torch.rand(8, 12), "eager", compiled=False)
    assert "off by" in step.wrong()


@pytest.mark.parametrize("model", models.MODELS, ids=lambda m: m.name)
def test_models_have_the_shapes_they_say(model: models.Model) -> None:
    vae = model.build(False)
    x = model.data(1)
    with torch.no_grad():
        mu, _ = vae.encoder(x).chunk(2, dim=1)
        assert tuple(mu.shape[1:]) == model.latent
        assert vae.decoder(mu).shape == (1, *model.case.packed)


# The command --------------------------------------------------------------------------------------


def test_without_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["meta", "nonsense"])
def test_a_device_without_benchmarks(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", device]) == 2
    assert device in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--seconds", "0"], ["--seconds", "nan"], ["--ops", "nothing"]]
)
def test_wrong_options(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2


MISSING_EXTRAS = """
import sys
from fastvae.cli import main
for module in ("cpuinfo", "rich", "matplotlib"):  # as they are imported, so that none is there already
    sys.modules[module] = None
    assert main(["bench"]) == 1
    del sys.modules[module]
"""


def test_a_missing_extra_is_named() -> None:
    ran = subprocess.run([sys.executable, "-c", MISSING_EXTRAS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        f"needs {package}" for package in ("py-cpuinfo", "rich", "matplotlib")
    ]
    assert all(line.endswith(": pip install rich matplotlib py-cpuinfo") for line in lines)


@pytest.mark.slow
def test_as_users_run_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastvae", "bench", "--quick", "--results", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = report.read_json(tmp_path / "results.json")
    assert {"fastvae", "eager", "functional", "distributions", "compile"} <= {
        r["baseline"] for r in found["rows"]
    }
    assert {r["suite"] for r in found["rows"]} == {"ops", "growth", "steps"}
    assert {p.name for p in tmp_path.glob("*.png")} == set(report.PLOTS)


@pytest.mark.slow
@pytest.mark.parametrize("model", models.MODELS, ids=lambda m: m.name)
def test_models_are_right(model: models.Model) -> None:
    torch.manual_seed(0)
    x = model.data(2)
    for objective in ("fastvae", "eager"):
        step = models.Step(model.build(False), x, objective, False, model.likelihood)
        assert step.wrong() == ""


# What is published --------------------------------------------------------------------------------


def published() -> list[Path]:
    return sorted((ROOT / "benchmarks" / "results").glob("*/results.json"))


def test_the_readme_says_what_the_results_say() -> None:
    publish = runpy.run_path(str(ROOT / "benchmarks" / "publish.py"))
    for path, text in publish["pages"](publish["stored"]()).items():
        assert path.read_text() == text, f"{path} is stale: run `make results`"


@pytest.mark.parametrize("path", published(), ids=lambda p: p.parent.name)
def test_published_figures_carry_their_machine(path: Path) -> None:
    about = report.read_json(path)["machine"]
    readme, page = (ROOT / name for name in ("README.md", "docs/speed.md"))
    for key in ("torch", "commit", "date", "python", "command"):
        assert about[key] and about[key] in page.read_text()
        assert about[key] in readme.read_text() or key in ("python", "command")
    assert not math.isnan(about["copy_bandwidth"])
    assert "+changes" not in about["commit"]


@pytest.mark.parametrize(
    "load, gpu, warned", [(3.0, None, 1), (0.1, None, 0), (None, None, 0), (3.0, "g", 0)]
)
def test_a_busy_machine_is_said(load: float | None, gpu: str | None, warned: int) -> None:
    assert len(list(report.busy({"machine": {"load": load, "gpu": gpu}}))) == warned


def test_a_readme_without_markers_is_refused() -> None:
    assert report.with_section("a <>old</> b", ("<>", "</>"), "new ") == "a <>\nnew </> b"
    with pytest.raises(ValueError, match="markers"):
        report.with_section("nothing here", report.SPEED, "")


def test_pictures_of_growth_and_steps(tmp_path: Path) -> None:
    """From made-up rows: all suites, a GPU's baselines, and gaps."""
    rows = []
    suites = [("growth", cases.growing(1 << n), BOTH) for n in (8, 10, 12)]
    suites += [("batch", cases.growing_batch(n), BOTH) for n in (1, 4)]
    suites += [("threads", cases.growing(1 << n), BOTH) for n in (8, 10)]
    suites += [("steps", models.MODELS[0].case, "step")]
    for suite, case, which in suites:
        op = "step: MLP, MNIST" if which == "step" else case.op
        for i, name in enumerate(plots.COLOURS):
            if (suite, case.pixels, name) == ("growth", 1 << 10, "jax"):
                continue
            least = None if which == "step" else case.least_bytes(which)
            row = run.Row(
                suite, op, case.shape, "float32", "cuda", which, name, i + 1.0, i + 0.9, i + 1.1
            )
            row.bytes, row.speedup = least, i + 1.0
            rows.append(row.as_json())
    about = {
        "cpu": "c",
        "gpu": "g",
        "threads": 1,
        "cuda": "13",
        "torch": "t",
        "commit": "x",
        "date": "d",
    }
    found = {"machine": about | {"copy_bandwidth": 1e9, "load": None}, "rows": rows, "left_out": []}
    drawn = plots.draw_all(tmp_path, found)
    assert {path.name for path in drawn} == {"growth.png", "steps.png"}
