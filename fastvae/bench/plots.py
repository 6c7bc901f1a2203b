"""The pictures of a run, on a transparent background in colours that light and dark pages both show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fastvae.bench.report import Report, any_of, caption, seconds, select, size, step_rows
from fastvae.bench.run import AGAIN

INK = "#7d8590"  # 4 to 1 on white and on a dark page alike
COLOURS = {
    "fastvae": "#2f81f7",
    "eager": "#e5534b",
    "functional": "#db8b26",
    "distributions": "#a371f7",
    "compile": "#2da44e",
    "compile-reduce-overhead": "#1b9e9e",
    "jax": "#d16ba5",
    "fastvae-compile": "#6cb6ff",
    "fastvae-cuda-graph": "#6cb6ff",
}
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.transparent": True,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.1,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw_all(folder: Path, found: Report) -> list[Path]:
    """Write what the run has figures for into `folder`; the paths."""
    figures = {
        "speedup.png": speedup,
        "growth.png": growth,
        "steps.png": steps,
        "memory.png": memory,
    }
    paths = []
    with rc_context(STYLE):
        for name, draw in figures.items():
            if (figure := draw(found)) is not None:
                figure.supxlabel(caption(found), x=0.01, ha="left", fontsize=7)
                paths.append(folder / name)
                figure.savefig(paths[-1], metadata={"Software": None})
    return paths


def _ratio_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _bars(
    axes: Axes,
    labels: Sequence[str],
    values: Mapping[str, Sequence[float]],
    start: float,
    write: Any,
) -> None:
    """Groups of horizontal bars from `start`, the first on top, each with its value; NaN is none."""
    height = 0.8 / len(values)
    for i, (name, lengths) in enumerate(values.items()):
        places = [j - 0.4 + (i + 0.5) * height for j in range(len(labels))]
        drawn = [0 if math.isnan(v) else v - start for v in lengths]
        colour = COLOURS[name]
        axes.barh(places, drawn, height * 0.9, left=start, color=colour, label=name)
        for place, value in zip(places, lengths, strict=True):
            if not math.isnan(value):
                right = max(value, start) if axes.get_xscale() == "log" else value
                axes.annotate(
                    write(value),
                    (right, place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=6.5,
                )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _names(chosen: Sequence[Mapping[str, Any]]) -> list[str]:
    return [n for n in COLOURS if n != AGAIN and any(n in group for group in chosen)]


def _float_groups(found: Report) -> list[dict[str, Any]]:
    chosen = select(found, suite="ops", cache="warm", which="both", dtype="float32")
    return [g for g in chosen if "fastvae" in g and len(g) > 1]


def speedup(found: Report) -> Figure | None:
    """Bars of the ratios, forward and backward in float32."""
    chosen = _float_groups(found)
    if not chosen:
        return None
    names = [n for n in _names(chosen) if n != "fastvae"]
    labels = [f"{any_of(g)['op']}\n{any_of(g)['shape']}" for g in chosen]
    values = {n: [g[n]["speedup"] if n in g else math.nan for g in chosen] for n in names}
    figure = Figure(
        figsize=(8, 0.8 + 0.14 * len(chosen) * (len(names) + 1.5)), layout="constrained"
    )
    axes = figure.subplots()
    _ratio_axis(axes)
    _bars(axes, labels, values, 1.0, lambda v: f"{v:.1f}" if v >= 2 else f"{v:.2f}")
    axes.axvline(1, color=COLOURS["fastvae"], linewidth=1.5)
    axes.set_title(
        "Time as a multiple of fastvae's (the line at 1 x), forward and backward, float32"
    )
    figure.legend(loc="outside upper left", ncols=len(names))
    return figure


def growth(found: Report) -> Figure | None:
    """Time against N and against the batch, log-log; the floor is the least bytes at the copy bandwidth."""
    titles = {
        "growth": ("vae_loss, N growing, M = N / 16", "N, elements of recon_x"),
        "batch": ("vae_loss, the batch growing (784 + 20 each)", "batch"),
    }
    panels = {s: _by_extent(found, s) for s in titles}
    panels = {s: groups for s, groups in panels.items() if len(groups) > 1}
    if not panels:
        return None
    figure = Figure(figsize=(4.6 * max(len(panels), 1.4), 4.2), layout="constrained")
    for axes, (suite, chosen) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name in _names(chosen):
            points = [
                (_extent(any_of(g)["shape"], suite), g[name]["median"]) for g in chosen if name in g
            ]
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[name],
                marker="o",
                markersize=3,
                label=name,
            )
        if suite == "growth":
            single = [g["fastvae"] for g in _by_extent(found, "threads") if "fastvae" in g]
            points = [(_extent(r["shape"], suite), r["median"]) for r in single]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=COLOURS["fastvae"],
                    linestyle=(0, (2, 2)),
                    label="fastvae, 1 thread",
                )
        bandwidth = found["machine"]["copy_bandwidth"]
        floor = [
            (_extent(any_of(g)["shape"], suite), any_of(g)["bytes"] / bandwidth) for g in chosen
        ]
        axes.plot(*zip(*floor, strict=True), color=INK, linestyle="--", label="memory floor")
        title, label = titles[suite]
        axes.set(xscale="log", yscale="log", xlabel=label, title=title)
        axes.set_ylim(bottom=min(r["median"] for g in chosen for r in g.values()) / 4)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"$2^{{{round(math.log2(v))}}}$"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: seconds(v)))
        axes.grid()
        axes.legend(loc="upper left")
    return figure


def _by_extent(found: Report, suite: str) -> list[dict[str, Any]]:
    chosen = select(found, suite=suite)
    return sorted(chosen, key=lambda group: _extent(any_of(group)["shape"], suite))


def _extent(shape: str, suite: str) -> int:
    """N or the batch from a row's shape, like "16x64 + 16x4"."""
    lengths = [int(n) for n in shape.split(" + ")[0].split("x")]
    return lengths[0] if suite == "batch" else math.prod(lengths)


def steps(found: Report) -> Figure | None:
    """Training steps as multiples of fastvae's, and the objective's share in the plain one."""
    chosen = [(g, shares) for g, shares in step_rows(found) if "fastvae" in g]
    if not chosen:
        return None
    names = [n for n in _names([g for g, _ in chosen]) if n != "fastvae"]
    labels = []
    for group, shares in chosen:
        ours = group["fastvae"]
        label = f"{ours['op'].removeprefix('step: ')}\nfastvae {seconds(ours['median'])}"
        if "eager" in shares:
            label += f"\nobjective {shares['eager']:.1%} of eager"
        labels.append(label)
    values = {n: [g[n]["speedup"] if n in g else math.nan for g, _ in chosen] for n in names}
    figure = Figure(
        figsize=(7.5, 1.0 + 0.16 * len(chosen) * (len(names) + 1.5)), layout="constrained"
    )
    axes = figure.subplots()
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    _bars(axes, labels, values, 0.0, lambda v: f"{v:.2f}")
    axes.axvline(1, color=COLOURS["fastvae"], linewidth=1.5)
    axes.set_title("A whole training step as a multiple of that with fastvae (the line at 1)")
    figure.legend(loc="outside upper left", ncols=len(names))
    return figure


def memory(found: Report) -> Figure | None:
    """Peak bytes beyond the inputs, forward and backward, at the largest sizes of each op."""
    largest: dict[str, dict[str, Any]] = {}
    for group in _float_groups(found):
        if any_of(group)["peak_bytes"]:
            largest[any_of(group)["op"]] = group  # sizes grow in the order of the rows
    chosen = list(largest.values())
    if not chosen:
        return None
    names = _names(chosen)
    labels = [f"{any_of(g)['op']}\n{any_of(g)['shape']}" for g in chosen]
    values = {
        n: [g[n]["peak_bytes"] if n in g and g[n]["peak_bytes"] else math.nan for g in chosen]
        for n in names
    }
    figure = Figure(
        figsize=(8, 0.8 + 0.14 * len(chosen) * (len(names) + 1.5)), layout="constrained"
    )
    axes = figure.subplots()
    _bars(axes, labels, values, 0.0, size)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: size(v)))
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_title("Peak memory beyond the inputs, gradients included, forward and backward")
    figure.legend(loc="outside upper left", ncols=len(names))
    return figure
