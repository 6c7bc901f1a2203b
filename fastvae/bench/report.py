"""A run as JSON, CSV, tables on the terminal and in Markdown, and pictures."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cpuinfo
import pandas as pd
from matplotlib.figure import Figure

from fastvae.bench.run import AGAIN, Run
from fastvae.cli.info import info

Report = dict[str, Any]

SUITES = {
    "steps": "Training steps",
    "ops": "Ops at the sizes of real models",
    "likelihoods": "Likelihoods",
    "terms": "Options of the KL, other divergences, importance weights",
    "pairs": "Samples and Gaussian components, all pairs",
    "compiled": "In a compiled program, after a decoder's sigmoid",
    "growth": "N growing",
    "narrow": "16 bits",
}
PLOTS = {
    "steps.png": "A whole training step as a multiple of that with fastvae",
    "growth.png": "Seconds of vae_loss: N of recon_x growing, M = N / 16",
}
KEYS = ["suite", "op", "shape", "dtype", "pass"]
# As the columns stand.
BASELINES = ["fastvae", "eager", "functional", "distributions", "scvi-tools", "compile"]
BASELINES += ["compile-reduce-overhead", "jax", "fastvae-cuda-graph", "fastvae-compile", AGAIN]
TIMES = {1e-6: "us", 1e-3: "ms", 1.0: "s"}
BUSY = 0.5  # the load before a run from which it says so
SIZES = {1.0: "B", 1e3: "kB", 1e6: "MB", 1e9: "GB"}


def report(run: Run, argv: Sequence[str]) -> Report:
    """The machine as `fastvae info` has it and more, rows, and what was left out; `copy_bandwidth` is bytes a second."""
    again = [r["speedup"] for r in run.rows if r["baseline"] == AGAIN and r["speedup"]]
    off = (pd.Series(again, dtype=float) - 1).abs()
    machine = {name: value for section in info().values() for name, value in section.items()} | {
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", "unknown"),
        "gpu": run.device.gpu,
        "date": time.strftime("%Y-%m-%d"),
        "copy_bandwidth": run.copy_bandwidth,
        # The same code timed twice: by how much its ratio was off 1, in the middle and in nine of ten.
        "noise": {"rows": len(off), "median": off.quantile(0.5), "p90": off.quantile(0.9)},
        "jax": getattr(sys.modules.get("jax"), "__version__", None),
        "load": run.load,
        "command": shlex.join(["fastvae", *argv]),
    }
    return {"machine": machine, "rows": run.rows, "left_out": run.left_out}


def write_json(path: Path, found: Report) -> None:
    """One row a line: readable, and small enough to keep."""
    lines = ",\n  ".join(map(json.dumps, found["rows"]))
    text = json.dumps({name: value for name, value in found.items() if name != "rows"}, indent=1)
    path.write_text(f'{text[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')


def caption(found: Report) -> str:
    """One line that a figure may not be without."""
    about = found["machine"]
    where = f"{about['cpu']}, {about['threads']} threads"
    where = f"{about['gpu']}, CUDA {about['cuda']}" if about["gpu"] else where
    return f"{where}, torch {about['torch']}, commit {about['commit']}, {about['date']}"


def rows_of(found: Report) -> pd.DataFrame:
    return pd.DataFrame(found["rows"], columns=None if found["rows"] else KEYS)


def in_units(value: float, units: dict[float, str]) -> str:
    """Three digits, and the largest unit that leaves a number above 1."""
    scale = max((s for s in units if s <= value), default=min(units))
    return f"{value / scale:.3g} {units[scale]}"


def wide(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """A line for each pass of a case, a column for each baseline."""
    lines = pd.MultiIndex.from_frame(frame[KEYS].drop_duplicates())
    found = frame.groupby([*KEYS, "baseline"])[value].first().unstack("baseline")
    return found.reindex(index=lines, columns=[b for b in BASELINES if b in found])


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """fastvae's time, and how many times as long the others take; columns that say nothing are left out."""
    alone = frame.op.str.startswith("objective of: ")
    of_steps = frame[alone].replace({"op": "objective of", "pass": "both"}, "step", regex=True)
    frame = frame[~alone]
    ratios, shares = wide(frame, "speedup"), wide(of_steps, "median") / wide(frame, "median")
    ours = frame[frame.baseline == "fastvae"].groupby(KEYS).first().reindex(ratios.index)
    time, size = partial(in_units, units=TIMES), partial(in_units, units=SIZES)
    columns: list[Any] = [("fastvae", ours["median"], time)]
    columns += [(n, ratios[n], "{:.2f} x".format) for n in ratios if n != "fastvae"]
    columns += [
        (f"objective, {n}", shares[n], "{:.1%}".format) for n in ("eager", "fastvae") if n in shares
    ]
    columns += [("least", ours.bytes, size), ("of copy", ours.bandwidth_fraction, "{:.0%}".format)]
    peaks = wide(frame, "peak_bytes")
    columns += [(f"peak, {n}", peaks[n], size) for n in ("fastvae", "eager") if n in peaks]
    texts = {name: values.map(write, na_action="ignore") for name, values, write in columns}
    cells = pd.DataFrame(texts, ratios.index).dropna(axis=1, how="all").fillna("").reset_index()
    cells["op"] = cells.op.str.removeprefix("step: ")
    told = [c in ("op", "shape") or c not in KEYS or cells[c].nunique() > 1 for c in cells]
    return cells.loc[:, told]


def notes(found: Report) -> Iterator[str]:
    """What has to be known about the figures."""
    about, noise = found["machine"], found["machine"]["noise"]
    copy = f"{about['copy_bandwidth'] / 1e9:.3g} GB/s"
    yield f"{caption(found)}, Python {about['python']}, by `{about['command']}`"
    yield f"x: how many times fastvae's median. least: the bytes that must move. peak: held beyond the inputs. of copy: the share of the copy bandwidth, {copy}; above 100% from caches."
    if (about["load"] or 0) > BUSY and not about["gpu"]:
        yield f"The machine was busy when this began (load {about['load']:.1f}): believe no figure."
    if noise["rows"]:
        yield f"Noise: {AGAIN} is the same code timed twice. Its ratio was off 1 by {noise['median']:.1%} in the middle, and by {noise['p90']:.1%} at most in nine of ten of {noise['rows']} rows."
    left_out = pd.DataFrame(found["left_out"], columns=["baseline", "reason", "wrong", "what"])
    for (baseline, reason, wrong), items in left_out.groupby(["baseline", "reason", "wrong"]):
        yield f"{'WRONG, not timed' if wrong else 'left out'}: {baseline} of {'; '.join(items.what)}: {reason}"


def sections(found: Report, every: bool = False) -> Iterator[str]:
    """Tables in Markdown with their titles: of every row, or with forward and backward together where an op has all passes."""
    frame = rows_of(found)
    frame.loc[(frame.suite == "ops") & (frame.dtype != "float32"), "suite"] = "narrow"
    if not every:
        frame = frame.query("baseline != @AGAIN and `pass` != 'backward'")
        frame = frame.query("suite not in ['ops', 'narrow'] or `pass` == 'both'")
    for suite, title in SUITES.items():
        if len(rows := frame[frame.suite == suite]):
            yield f"{title}\n\n{table(rows).to_markdown(index=False, disable_numparse=True)}"


def write_folder(folder: Path, found: Report) -> None:
    """CSV, pictures and page beside a folder's results.json."""
    rows_of(found).to_csv(folder / "results.csv", index=False)
    lines = [f"# {caption(found)}", "\n".join(f"* {line}" for line in notes(found))]
    pictures = [f"![{PLOTS[name]}]({name})" for name in draw_all(folder, found)]
    each = [f"## {section}" for section in sections(found)]
    last = "Every row is in [results.csv](results.csv) and [results.json](results.json); [the method](../../README.md)."
    parts = [*lines, *each[:1], *pictures, *each[1:], last]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def draw_all(folder: Path, found: Report) -> Iterator[str]:
    """Draws what the run has figures for; the names of the files in `folder`."""

    def draw(values: pd.DataFrame, name: str, height: float, **options: Any) -> str:
        figure = Figure((10, height), layout="constrained")
        axes = values.plot(ax=figure.subplots(), legend=False, **options)
        figure.suptitle(f"{PLOTS[name]}\n{caption(found)}", fontsize="medium")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
        figure.savefig(folder / name, metadata={"Software": None})
        return name

    frame = rows_of(found).query("baseline != @AGAIN")
    values = wide(frame[frame["pass"] == "step"], "speedup")
    if values.shape[1] > 1:
        values.index = [f"{key[1].removeprefix('step: ')}\n{key[2]}" for key in values.index]
        height = 1 + 0.12 * values.size
        yield draw(values.iloc[::-1], "steps.png", height, kind="barh", width=0.8)
    rows = frame[frame.suite == "growth"]
    if len(rows):
        values = rows.pivot_table("median", "bytes", "baseline")
        values["memory floor"] = values.index / found["machine"]["copy_bandwidth"]
        label = {"xlabel": "bytes to be moved"}
        yield draw(values, "growth.png", 4, loglog=True, marker=".", **label)
