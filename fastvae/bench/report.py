"""A run as JSON, CSV, tables on the terminal and in Markdown, and pictures."""

from __future__ import annotations

import json
import math
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

import fastvae
from fastvae._ops import build_info, cpu_capability
from fastvae.bench.run import AGAIN, Run

Report = dict[str, Any]

# Baselines as columns stand, with colours that light and dark pages both show.
COLOURS = {
    **{
        "fastvae": "#2f81f7",
        "eager": "#e5534b",
        "functional": "#db8b26",
        "distributions": "#a371f7",
    },
    **{"scvi-tools": "#57606a", "compile": "#2da44e", "compile-reduce-overhead": "#1b9e9e"},
    **{"jax": "#d16ba5", "fastvae-plain": "#adbac7", "fastvae-cuda-graph": "#6cb6ff"},
    **{"fastvae-compile": "#6cb6ff", "fastvae, 1 thread": "#6cb6ff", "memory floor": "#7d8590"},
}
BUSY = 0.5  # the load before a run from which it says so
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
KEYS = ["suite", "op", "shape", "dtype", "pass", "cache", "threads"]


def _commit() -> str:
    """Of the checkout this runs from, or what the extension was built from."""
    root = Path(fastvae.__file__).resolve().parents[1]
    # What a run writes itself changes nothing that is timed.
    commands = ["rev-parse HEAD", "status --porcelain -uno -- fastvae csrc setup.py"]
    git = [["git", "-C", str(root), *command.split()] for command in commands]
    try:
        head, changed = (
            subprocess.check_output(c, stderr=subprocess.DEVNULL, text=True) for c in git
        )
    except (OSError, subprocess.CalledProcessError):
        return str(build_info()["commit"])
    return head[:12] + "+changes" * bool(changed)


def report(run: Run, argv: Sequence[str]) -> Report:
    """Machine, rows and what was left out; `copy_bandwidth` is bytes a second, read and written."""
    import cpuinfo

    off = sorted(abs(r["speedup"] - 1) for r in run.rows if r["baseline"] == AGAIN and r["speedup"])
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
        "noise": {
            "rows": len(off),
            "median": statistics.median(off) if off else None,
            "p90": off[int(0.9 * (len(off) - 1))] if off else None,
        },
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
    where = f"{about['gpu']}, CUDA {about['cuda']}"
    where = where if about["gpu"] else f"{about['cpu']}, {about['threads']} threads"
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
    return found[[b for b in [*COLOURS, AGAIN] if b in found]]


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
    told = (cells[c].nunique() > 1 or (c not in KEYS and cells[c].iloc[0]) for c in cells)
    return cells[[c for c, tells in zip(cells, told, strict=True) if tells or c in ("op", "shape")]]


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


def print_tables(console: Any, found: Report) -> None:
    from rich import box
    from rich.table import Table

    frame = rows_of(found)
    for suite in frame.suite.unique():
        cells = table(frame[frame.suite == suite])
        drawn = Table(
            *cells.columns, title=SUITES[suite], title_justify="left", box=box.SIMPLE_HEAD
        )
        for line in cells.itertuples(index=False):
            drawn.add_row(*map(str, line))
        console.print(drawn)
    for line in notes(found):
        console.print(line, highlight=False, soft_wrap=True)


def sections(found: Report) -> Iterator[tuple[str, str]]:
    """Titles, and tables in Markdown; forward and backward together where an op has all passes."""
    frame = rows_of(found).query("baseline != @AGAIN")
    both, floats, cold = frame["pass"] == "both", frame.dtype == "float32", frame.cache == "cold"
    chosen = {
        title: (frame.suite == s) & (frame["pass"] != "backward") for s, title in SUITES.items()
    }
    chosen[SUITES["ops"]] &= both & floats & ~cold
    chosen["16 bits"] = (frame.suite == "ops") & both & ~floats
    chosen["Cold caches"] = cold
    for title, those in chosen.items():
        if those.any():
            cells = table(frame[those]).drop(columns="p20 - p80")
            yield title, cells.to_markdown(index=False, disable_numparse=True)


def write_folder(folder: Path, found: Report) -> None:
    """CSV, pictures and page beside a folder's results.json."""
    rows_of(found).to_csv(folder / "results.csv", index=False)
    lines = [f"# {caption(found)}", "\n".join(f"* {line}" for line in notes(found))]
    pictures = [f"![{PLOTS[path.name]}]({path.name})" for path in draw_all(folder, found)]
    each = [f"## {title}\n\n{text}" for title, text in sections(found)]
    last = "Every row is in [results.csv](results.csv) and [results.json](results.json); [the method](../../README.md)."
    (folder / "README.md").write_text(
        "\n\n".join([*lines, *each[:1], *pictures, *each[1:], last]) + "\n"
    )


# Pictures -----------------------------------------------------------------------------------------

PLOTS = {
    "steps.png": "A whole training step as a multiple of that with fastvae",
    "speedup.png": "Time as a multiple of fastvae's, forward and backward, float32",
    "growth.png": "Seconds of vae_loss: N of recon_x growing, M = N / 16; the batch growing, MNIST",
    "memory.png": "Peak memory beyond the inputs, forward and backward",
}
INK = dict.fromkeys(
    ("text.color", "axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor"), "#7d8590"
)
STYLE: Any = {
    "savefig.transparent": True,
    "font.size": 7,
    "axes.grid": True,
    "grid.alpha": 0.3,
    **INK,
}


def draw_all(folder: Path, found: Report) -> list[Path]:
    """Write what the run has figures for into `folder`; the paths."""
    frame = rows_of(found).query("baseline != @AGAIN and cache == 'warm'")
    both = (frame["pass"] == "both") & (frame.dtype == "float32")
    both &= frame.suite.isin(["ops", "likelihoods", "terms", "pairs"])
    panels = {
        "steps.png": [wide(frame[frame["pass"] == "step"], "speedup")],
        "speedup.png": [wide(frame[both], "speedup")],
        "memory.png": [wide(frame[both], "peak_bytes")],
        "growth.png": [_growth(frame, suite, found["machine"]) for suite in ("growth", "batch")],
    }
    paths = []
    for name, facets in panels.items():
        lines, facets = (
            name == "growth.png",
            [f.dropna(axis=1, how="all") for f in facets if len(f)],
        )
        if not facets or len(facets[0].columns) < 2:
            continue
        with rc_context(STYLE):
            height = 4 if lines else 1 + 0.12 * facets[0].size
            figure = Figure(figsize=(8, height), layout="constrained")
            for axes, values in zip(
                figure.subplots(1, len(facets), squeeze=False)[0], facets, strict=True
            ):
                options: Any = {"ax": axes, "color": [COLOURS[c] for c in values], "legend": False}
                if lines:
                    values.plot(loglog=True, marker=".", **options)
                    continue
                values.index = values.index.map(lambda k: f"{k[1].removeprefix('step: ')}\n{k[2]}")
                values.plot.barh(logx=name != "steps.png", width=0.8, xlabel="", **options)
                axes.invert_yaxis()
                for bar in axes.containers:
                    write = size if name == "memory.png" else "{:.2f}".format
                    axes.bar_label(
                        bar, [write(v) if v > 0 else "" for v in bar.datavalues], fontsize=5
                    )
            figure.suptitle(f"{PLOTS[name]}\n{caption(found)}", x=0.01, ha="left")
            labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(*labels, loc="outside lower left", ncols=6)
            paths.append(folder / name)
            figure.savefig(paths[-1], metadata={"Software": None}, dpi=110)
    return paths


def _growth(frame: pd.DataFrame, suite: str, machine: Mapping[str, Any]) -> pd.DataFrame:
    """Seconds by the size that grows, with one thread and the memory floor."""
    axis = "batch" if suite == "batch" else "N"
    lengths = frame["shape"].str.split(" ").str[0].str.split("x")
    frame = frame.assign(
        **{axis: lengths.map(lambda n: math.prod(map(int, n[:1] if suite == "batch" else n)))}
    )
    rows = frame[frame.suite == suite]
    grown = rows.pivot_table("median", axis, "baseline")
    if len(grown):
        grown["memory floor"] = rows.groupby(axis)["bytes"].first() / machine["copy_bandwidth"]
        single = frame[
            (frame.suite == "threads") & (frame.baseline == "fastvae") & (suite == "growth")
        ]
        grown["fastvae, 1 thread"] = single.set_index(axis)["median"]
    return grown
