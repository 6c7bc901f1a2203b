"""A run as JSON, CSV, tables on the terminal and in Markdown, and pictures."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cpuinfo
import pandas as pd
import torch
from matplotlib.figure import Figure

import fastvae
from fastvae._ops import build_info, cpu_capability
from fastvae.bench.run import AGAIN, Run

Report = dict[str, Any]

SUITES = {
    "steps": "Training steps",
    "ops": "Ops at the sizes of real models",
    "likelihoods": "Likelihoods",
    "terms": "Options of the KL, other divergences, importance weights",
    "pairs": "Samples and Gaussian components, all pairs",
    "compiled": "In a compiled program, after a decoder's sigmoid",
    "growth": "N growing",
    "batch": "Batch growing",
    "threads": "One thread",
}
PLOTS = {
    "steps.png": "A whole training step as a multiple of that with fastvae",
    "growth.png": "Seconds of vae_loss: N of recon_x growing, M = N / 16; the batch growing, MNIST",
}
KEYS = ["suite", "op", "shape", "dtype", "pass", "cache", "threads"]
# As the columns stand.
BASELINES = ["fastvae", "eager", "functional", "distributions", "scvi-tools", "compile"]
BASELINES += ["compile-reduce-overhead", "jax", "fastvae-plain", "fastvae-cuda-graph"]
BASELINES += ["fastvae-compile", AGAIN]
BUSY = 0.5  # the load before a run from which it says so


def _commit() -> str:
    """Of the checkout this runs from, or what the extension was built from."""
    root = Path(fastvae.__file__).resolve().parents[1]
    # What a run writes itself changes nothing that is timed.
    commands = ["rev-parse --short=12 HEAD", "status --porcelain -uno -- fastvae csrc setup.py"]
    git = [["git", "-C", str(root), *command.split()] for command in commands]
    try:
        head, changed = (subprocess.run(c, capture_output=True, text=True).stdout for c in git)
    except OSError:  # there is no git
        head, changed = "", ""
    return head.strip() + "+changes" * bool(changed) or str(build_info()["commit"])


def report(run: Run, argv: Sequence[str]) -> Report:
    """Machine, rows and what was left out; `copy_bandwidth` is bytes a second, read and written."""
    again = [r["speedup"] for r in run.rows if r["baseline"] == AGAIN and r["speedup"]]
    off = (pd.Series(again, dtype=float) - 1).abs()
    machine = {
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", "unknown"),
        "threads": torch.get_num_threads(),
        "gpu": run.device.gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if run.device.gpu else None,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "copy_bandwidth": statistics.median(run.copies + run.copies_after),
        "copy_bandwidth_before_after": [*map(statistics.median, (run.copies, run.copies_after))],
        # The same code timed twice: by how much its ratio was off 1, in the middle and in nine of ten.
        "noise": {"rows": len(off), "median": off.quantile(0.5), "p90": off.quantile(0.9)},
        "device": run.device.type,
        "instruction_set": cpu_capability(),
        "fastvae": fastvae.__version__,
        "built_from": build_info()["commit"],
        "jax": run.jax and run.jax.jax.__version__,
        "load": run.load,
        "command": shlex.join(["fastvae", *argv]),
    }
    return {"machine": machine, "rows": run.rows, "left_out": run.left_out}


def write_json(path: Path, found: Report) -> None:
    """One row a line: readable, and small enough to keep."""
    lines = ",\n  ".join(json.dumps(row) for row in found["rows"])
    text = json.dumps({name: value for name, value in found.items() if name != "rows"}, indent=1)
    path.write_text(f'{text[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')


def caption(found: Report) -> str:
    """One line that a figure may not be without."""
    about = found["machine"]
    where = f"{about['cpu']}, {about['threads']} threads"
    where = f"{about['gpu']}, CUDA {about['cuda']}" if about["gpu"] else where
    return f"{where}, torch {about['torch']}, commit {about['commit']}, {about['date']}"


# Tables -------------------------------------------------------------------------------------------


def rows_of(found: Report) -> pd.DataFrame:
    return pd.DataFrame(found["rows"], columns=[*found["rows"][0]] if found["rows"] else KEYS)


def seconds(value: float) -> str:
    unit, scale = ("us", 1e6) if value < 1e-3 else ("ms", 1e3) if value < 1 else ("s", 1)
    return f"{value * scale:.3g} {unit}"


def size(value: float) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def wide(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """A line for each pass of a case, a column for each baseline."""
    lines = pd.MultiIndex.from_frame(frame[KEYS].drop_duplicates())
    found = frame.set_index([*KEYS, "baseline"])[value].unstack("baseline").reindex(lines)
    return found[[b for b in BASELINES if b in found]]


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """fastvae's time, and how many times as long the others take; columns that say nothing are left out."""
    alone = frame[frame.op.str.startswith("objective of: ")]
    frame = frame.drop(alone.index)
    ratios, peaks = wide(frame, "speedup"), wide(frame, "peak_bytes")
    ours = frame[frame.baseline == "fastvae"].set_index(KEYS).reindex(ratios.index)

    def text(values: Any, write: Any) -> Any:
        return values.map(lambda v: "" if pd.isna(v) else write(v))

    cells = pd.DataFrame({"fastvae": text(ours["median"], seconds).replace("", "not timed")})
    cells["p20 - p80"] = text(ours.p20, seconds) + " - " + text(ours.p80, seconds)
    for name in ratios.columns.drop("fastvae", errors="ignore"):
        cells[name] = text(ratios[name], "{:.2f} x".format)
    if len(alone):
        of_step = alone.assign(op=alone.op.str.replace("objective of", "step"), **{"pass": "step"})
        shares = wide(of_step, "median") / wide(frame, "median")
        for name in [n for n in ("eager", "fastvae") if n in shares]:
            cells[f"objective, {name}"] = text(shares[name], "{:.1%}".format)
    cells["least"] = text(ours.bytes, size)
    cells["of copy"] = text(ours.bandwidth_fraction, "{:.0%}".format)
    for name in [n for n in ("fastvae", "eager") if n in peaks]:
        cells[f"peak, {name}"] = text(peaks[name], size)
    cells["launches"] = text(ours.launches, "{:.0f}".format)
    cells = cells.reset_index()
    cells["op"] = cells.op.str.removeprefix("step: ")
    told = [cells[c].nunique() > 1 or (c not in KEYS and cells[c].iloc[0] != "") for c in cells]
    return cells.loc[:, [t or c in ("op", "shape") for c, t in zip(cells, told, strict=True)]]


def notes(found: Report) -> Iterator[str]:
    """What has to be known about the figures."""
    about, noise = found["machine"], found["machine"]["noise"]
    before, after = (f"{b / 1e9:.3g} GB/s" for b in about["copy_bandwidth_before_after"])
    yield f"{caption(found)}, Python {about['python']}, by `{about['command']}`"
    yield f"x: how many times fastvae's median. least: the bytes that must move. peak: held beyond the inputs. of copy: the share of the copy bandwidth ({before} at the start, {after} at the end); above 100% from caches."
    if (about["load"] or 0) > BUSY and not about["gpu"]:
        yield f"The machine was busy when this began (load {about['load']:.1f}): believe no figure."
    if noise["rows"]:
        yield f"Noise: {AGAIN} is the same code timed twice. Its ratio was off 1 by {noise['median']:.1%} in the middle, and by {noise['p90']:.1%} at most in nine of ten of {noise['rows']} rows."
    left_out = pd.DataFrame(found["left_out"], columns=["baseline", "reason", "wrong", "what"])
    for (baseline, reason, wrong), items in left_out.groupby(["baseline", "reason", "wrong"]):
        yield f"{'WRONG, not timed' if wrong else 'left out'}: {baseline} of {'; '.join(items.what)}: {reason}"


def print_tables(found: Report) -> None:
    frame = rows_of(found)
    for suite, title in SUITES.items():
        if len(rows := frame[frame.suite == suite]):
            cells = table(rows).to_markdown(tablefmt="simple", index=False, disable_numparse=True)
            print(f"{title}\n\n{cells}\n")
    print("\n".join(notes(found)))


def sections(found: Report) -> Iterator[tuple[str, str]]:
    """Titles, and tables in Markdown; forward and backward together where an op has all passes."""
    frame = rows_of(found).query("baseline != @AGAIN and `pass` != 'backward'")
    ops = frame.query("suite == 'ops' and `pass` == 'both'")
    chosen = {title: frame[frame.suite == suite] for suite, title in SUITES.items()}
    chosen[SUITES["ops"]] = ops.query("dtype == 'float32' and cache == 'warm'")
    chosen["16 bits"] = ops.query("dtype != 'float32'")
    chosen["Cold caches"] = frame.query("cache == 'cold'")
    for title, rows in chosen.items():
        if len(rows):
            cells = table(rows).drop(columns="p20 - p80")
            yield title, cells.to_markdown(index=False, disable_numparse=True)


def write_folder(folder: Path, found: Report) -> None:
    """CSV, pictures and page beside a folder's results.json."""
    rows_of(found).to_csv(folder / "results.csv", index=False)
    lines = [f"# {caption(found)}", "\n".join(f"* {line}" for line in notes(found))]
    pictures = [f"![{PLOTS[name]}]({name})" for name in draw_all(folder, found)]
    each = [f"## {title}\n\n{text}" for title, text in sections(found)]
    last = "Every row is in [results.csv](results.csv) and [results.json](results.json); [the method](../../README.md)."
    parts = [*lines, *each[:1], *pictures, *each[1:], last]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


# Pictures -----------------------------------------------------------------------------------------


def draw_all(folder: Path, found: Report) -> Iterator[str]:
    """Draws what the run has figures for; the names of the files in `folder`."""

    def save(figure: Figure, name: str) -> str:
        figure.suptitle(f"{PLOTS[name]}\n{caption(found)}", fontsize="medium")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
        figure.savefig(folder / name, metadata={"Software": None})
        return name

    frame = rows_of(found).query("baseline != @AGAIN and cache == 'warm'")
    values = wide(frame[frame["pass"] == "step"], "speedup")
    options: Any = {"legend": False}
    if values.shape[1] > 1:
        values.index = [f"{key[1].removeprefix('step: ')}\n{key[2]}" for key in values.index]
        figure = Figure((9, 1 + 0.12 * values.size), layout="constrained")
        values.iloc[::-1].plot.barh(ax=figure.subplots(), width=0.8, **options)
        yield save(figure, "steps.png")
    suites, figure = ("growth", "batch"), Figure((10, 4), layout="constrained")
    for suite, axes in zip(suites, figure.subplots(1, 2), strict=True):
        rows = frame[(frame.suite == suite) & (frame["pass"] == "both")]
        values = rows.pivot_table("median", "bytes", "baseline")
        values["memory floor"] = values.index / found["machine"]["copy_bandwidth"]
        if len(values):
            options |= {"ax": axes, "title": suite, "xlabel": "bytes to be moved"}
            values.plot(loglog=True, marker=".", **options)
    if frame.suite.isin(suites).any():
        yield save(figure, "growth.png")
