"""A run as JSON, CSV, tables on the terminal, a page, and the README's section on speed."""

from __future__ import annotations

import csv
import json
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastvae
from fastvae._ops import build_info, cpu_capability
from fastvae.bench.devices import Device
from fastvae.bench.run import AGAIN, Result

Report = dict[str, Any]
Row = Mapping[str, Any]

# As columns stand; a run has those that it timed.
BASELINES = (
    "eager",
    "functional",
    "distributions",
    "compile",
    "compile-reduce-overhead",
    "jax",
    "fastvae-cuda-graph",
    "fastvae-compile",
    AGAIN,
)
BUSY = 0.5  # the load before a run from which it says so
SUITES = {
    "ops": "Ops at the sizes of real models",
    "likelihoods": "Likelihoods, forward and backward",
    "pairs": "Samples and Gaussian components, all pairs",
    "steps": "Training steps",
    "compiled": "In a compiled program, after a decoder's sigmoid",
    "growth": "N growing",
    "batch": "Batch growing",
    "threads": "One thread",
}


# The machine --------------------------------------------------------------------------------------


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """Of the checkout this runs from, or what the extension was built from."""
    root = Path(fastvae.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) == root:
            # What a run writes itself changes nothing that is timed.
            code = ["--", "fastvae", "csrc", "setup.py"]
            changed = git("status", "--porcelain", "--untracked-files=no", *code)
            return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    return str(build_info()["commit"])


def machine(device: Device, result: Result, argv: Sequence[str]) -> dict[str, Any]:
    """What a figure has to be read with; `copy_bandwidth` is bytes a second, read and written."""
    import cpuinfo

    again = [r for r in result.rows if r.baseline == AGAIN and r.speedup]
    off = sorted(abs(r.speedup - 1) for r in again if r.speedup)
    return {
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", "unknown"),
        "threads": torch.get_num_threads(),
        "gpu": device.gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.gpu else None,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "copy_bandwidth": statistics.median(result.copies + result.copies_after),
        "copy_bandwidth_before_after": [
            statistics.median(c) for c in (result.copies, result.copies_after)
        ],
        # The same code timed twice: by how much its ratio was off 1, in the middle and in nine of ten.
        "noise": {
            "rows": len(off),
            "median": statistics.median(off) if off else None,
            "p90": off[int(0.9 * (len(off) - 1))] if off else None,
        },
        "device": device.torch_device.type,
        "instruction_set": cpu_capability(),
        "fastvae": fastvae.__version__,
        "built_from": build_info()["commit"],
        "jax": _installed("jax"),
        "load": result.load,
        "command": shlex.join(["fastvae", *argv]),
    }


def report(device: Device, result: Result, argv: Sequence[str]) -> Report:
    return {
        "machine": machine(device, result, argv),
        "rows": [row.as_json() for row in result.rows],
        "left_out": [asdict(item) for item in result.left_out],
    }


def write_json(path: Path, found: Report) -> None:
    """One row a line: readable, and small enough to keep."""
    lines = ",\n  ".join(json.dumps(row) for row in found["rows"])
    rest = {name: value for name, value in found.items() if name != "rows"}
    text = json.dumps(rest, indent=1)
    path.write_text(f'{text[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')


def read_json(path: Path) -> Report:
    found: Report = json.loads(path.read_text())
    return found


def write_csv(path: Path, found: Report) -> None:
    rows = found["rows"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# Rows side by side --------------------------------------------------------------------------------


def groups(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """The rows of each pass of each case, by baseline."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    keys = ("suite", "op", "shape", "dtype", "pass", "threads", "cache")
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["baseline"]] = row
    return list(found.values())


def select(found: Report, **wanted: Any) -> list[dict[str, Row]]:
    """The groups whose rows have the values `wanted`; ``which`` stands for "pass"."""
    if "which" in wanted:
        wanted["pass"] = wanted.pop("which")
    rows = [r for r in found["rows"] if all(r[key] == value for key, value in wanted.items())]
    return groups(rows)


def seconds(value: float) -> str:
    for scale, unit in ((1e6, "us"), (1e3, "ms")):
        if value * scale < 1000:
            return f"{value * scale:.3g} {unit}"
    return f"{value:.3g} s"


def _span(low: float, high: float) -> str:
    number, unit = seconds(high).split()
    scale = {"us": 1e6, "ms": 1e3, "s": 1.0}[unit]
    return f"{low * scale:.3g} - {number} {unit}"


def size(value: float | None) -> str:
    if value is None:
        return ""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _ratio(row: Row | None) -> str:
    if row is None or row["speedup"] is None:
        return ""
    return f"{row['speedup']:.2f}"


def any_of(group: Mapping[str, Row]) -> Row:
    return group.get("fastvae") or next(iter(group.values()))


def caption(found: Report) -> str:
    """One line that a figure may not be without."""
    about = found["machine"]
    threads = f", {about['threads']} threads" if not about["gpu"] else f", CUDA {about['cuda']}"
    return (
        f"{about['gpu'] or about['cpu']}{threads}, torch {about['torch']}, commit {about['commit']}, "
        f"{about['date']}"
    )


def busy(found: Report) -> Iterator[str]:
    """A warning, where the machine did other things than this run."""
    load = found["machine"]["load"]
    if load is not None and load > BUSY and not found["machine"]["gpu"]:
        yield (
            f"The machine was busy when this began (load {load:.1f}): threads that wait for each other lose most by that; "
            "believe no figure."
        )


# The terminal -------------------------------------------------------------------------------------


def print_tables(console: Any, found: Report) -> None:
    from rich import box
    from rich.table import Table

    about = found["machine"]
    cuda = about["gpu"] is not None
    for suite, title in SUITES.items():
        chosen = select(found, suite=suite)
        if not chosen:
            continue
        names = [b for b in BASELINES if any(b in group for group in chosen)]
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("op", "shape", "dtype", "pass", "fastvae", "p20 - p80"):
            table.add_column(heading)
        for heading in [f"x {name}" for name in names] + ["least", "of copy", "peak"]:
            table.add_column(heading, justify="right")
        if cuda:
            table.add_column("launches", justify="right")
        for group in chosen:
            row = any_of(group)
            ours = group.get("fastvae")
            cold = ", cold" if row["cache"] == "cold" else ""
            cells = [row["op"], row["shape"], row["dtype"], row["pass"] + cold]
            cells += (
                [seconds(ours["median"]), _span(ours["p20"], ours["p80"])]
                if ours
                else ["not timed", ""]
            )
            cells += [_ratio(group.get(name)) for name in names]
            cells += [size(row["bytes"]), _share(row["bandwidth_fraction"] if ours else None)]
            cells.append(size(ours["peak_bytes"]) if ours else "")
            if cuda:
                cells.append(str(ours["launches"]) if ours and ours["launches"] is not None else "")
            table.add_row(*cells)
        console.print(table)
    for line in notes(found):
        console.print(line, highlight=False, soft_wrap=True)


def notes(found: Report) -> Iterator[str]:
    """What has to be known about the figures."""
    about, noise = found["machine"], found["machine"]["noise"]
    before, after = about["copy_bandwidth_before_after"]
    yield f"{caption(found)}; {about['command']}"
    yield (
        "Columns x: how many times fastvae's median the baseline takes. least: the bytes that must move. of copy: the share "
        f"of the copy bandwidth, {about['copy_bandwidth'] / 1e9:.3g} GB/s in this run ({before / 1e9:.3g} at its start, "
        f"{after / 1e9:.3g} at its end); above 100% from caches. peak: held beyond the inputs."
    )
    yield from busy(found)
    if noise["rows"]:
        yield (
            f"Noise: {AGAIN} is the same code timed twice. Its ratio was off 1 by {noise['median']:.1%} in the middle and by at "
            f"most {noise['p90']:.1%} in nine of ten rows."
        )
    together: dict[tuple[str, str, bool], list[str]] = {}
    for item in found["left_out"]:
        key = item["baseline"], item["reason"], item["wrong"]
        together.setdefault(key, []).append(item["what"])
    for (baseline, reason, wrong), what in together.items():
        kind = "WRONG, not timed" if wrong else "left out"
        yield f"{kind}: {baseline} of {'; '.join(what)}: {reason}"


# The page and the README --------------------------------------------------------------------------


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(headings) + " |"
    yield "|" + "---|" * len(headings)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _speed_table(found: Report, chosen: Sequence[Mapping[str, Row]]) -> Iterator[str]:
    names = [b for b in BASELINES if b != AGAIN and any(b in group for group in chosen)]
    rows = []
    for group in chosen:
        if (ours := group.get("fastvae")) is None:
            continue
        fraction = ours["bandwidth_fraction"]
        cells = [f"`{ours['op']}` {ours['shape']}", seconds(ours["median"])]
        cells += [f"{_ratio(group[n])} x" if n in group else "" for n in names]
        cells += [_share(fraction), size(ours["peak_bytes"])]
        rows.append(cells)
    yield from _table(["op, shape", "fastvae", *names, "of copy", "peak"], rows)


def step_rows(found: Report) -> list[tuple[Mapping[str, Row], dict[str, float]]]:
    """Each model's step, and by implementation the share of it that the objective alone takes."""
    result: list[tuple[Mapping[str, Row], dict[str, float]]] = []
    for group in select(found, suite="steps", which="step"):
        name = any_of(group)["op"].removeprefix("step: ")
        alone = select(found, suite="steps", op=f"objective of: {name}")
        shares = {
            kind: row["median"] / group[kind]["median"]
            for kind, row in (alone[0] if alone else {}).items()
            if kind in group
        }
        result.append((group, shares))
    return result


def _step_table(found: Report) -> Iterator[str]:
    steps = step_rows(found)
    names = [b for b in BASELINES if b != AGAIN and any(b in group for group, _ in steps)]
    rows = []
    for group, shares in steps:
        if (ours := group.get("fastvae")) is None:
            continue
        cells = [ours["op"].removeprefix("step: "), seconds(ours["median"])]
        cells += [f"{_ratio(group[n])} x" if n in group else "" for n in names]
        cells += [f"{shares[k]:.1%}" if k in shares else "" for k in ("eager", "fastvae")]
        cells += [size(group[k]["peak_bytes"]) if k in group else "" for k in ("eager", "fastvae")]
        rows.append(cells)
    headings = ["objective in eager", "in fastvae", "peak of eager", "of fastvae"]
    yield from _table(["training step", "fastvae", *names, *headings], rows)


def _sentences(found: Report) -> Iterator[str]:
    """What the figures say, made of them alone."""
    chosen = [
        g
        for g in select(found, suite="ops", cache="warm", which="both")
        if "fastvae" in g and "eager" in g
    ]
    if not chosen:
        return
    spread = {
        name: [g[name]["speedup"] for g in chosen if name in g]
        for name in ("eager", "compile", "jax")
    }
    parts = [
        f"{min(v):.1f} to {max(v):.1f} times as long as fastvae with `{name}`"
        for name, v in spread.items()
        if v
    ]
    yield "Forward and backward together take " + ", ".join(parts) + "."
    rivals = [
        (row["speedup"], name, row)
        for g in chosen
        for name, row in g.items()
        if not name.startswith("fastvae")
    ]
    ratio, name, row = min(rivals, key=lambda item: item[0])
    yield (
        f"The least to be won is against `{name}` in `{row['op']}` {row['shape']} {row['dtype']}: {ratio:.2f}."
    )
    sigmoid = [
        g["compile"]["median"] / g["fastvae-compile"]["median"]
        for g in select(found, suite="compiled")
        if "compile" in g and "fastvae-compile" in g
    ]
    if sigmoid:
        yield (
            "In a compiled program, behind a decoder's sigmoid, the plain objective takes "
            f"{min(sigmoid):.2f} to {max(sigmoid):.2f} times as long as fastvae's."
        )
    nothing = [
        f"{any_of(g)['op']} {_ratio(g['eager'])}"
        for g in select(found, suite="steps", which="step")
        if "eager" in g
    ]
    if nothing:
        yield (
            "A whole training step gains what its objective weighs in it; eager PyTorch's takes, as a multiple of fastvae's: "
            + ", ".join(nothing).replace("step: ", "")
            + "."
        )


PLOTS = {
    "speedup.png": "How many times as long as fastvae the others take",
    "growth.png": "Time against size, with the memory floor",
    "steps.png": "Whole training steps",
    "memory.png": "Peak memory beyond the inputs",
}


def page(found: Report, plots: Sequence[str]) -> str:
    """The README of a results folder."""
    about = found["machine"]
    lines = [
        f"# {caption(found)}",
        "",
        f"Made by `{about['command']}`; [the method](../../README.md).",
        "",
    ]
    lines += [" ".join(_sentences(found)), ""]
    for name in plots:
        lines += [f"![{PLOTS[name]}]({name})", ""]
    floats = select(found, suite="ops", cache="warm", which="both", dtype="float32")
    if floats:
        lines += ["## Forward and backward, float32", "", *_speed_table(found, floats), ""]
    cold = select(found, suite="ops", cache="cold", which="both", dtype="float32")
    if cold:
        lines += ["## The same with cold caches", "", *_speed_table(found, cold), ""]
    if compiled := select(found, suite="compiled", which="both"):
        lines += [f"## {SUITES['compiled']}", "", *_speed_table(found, compiled), ""]
    if likely := select(found, suite="likelihoods"):
        lines += [f"## {SUITES['likelihoods']}", "", *_speed_table(found, likely), ""]
    if pairs := select(found, suite="pairs", which="both"):
        lines += [f"## {SUITES['pairs']}", "", *_speed_table(found, pairs), ""]
    if step_rows(found):
        lines += ["## Training steps", "", *_step_table(found), ""]
    lines += ["## Notes", "", *(f"* {line}" for line in list(notes(found))[1:]), ""]
    lines += ["Every row is in [results.csv](results.csv) and [results.json](results.json)."]
    return "\n".join(lines) + "\n"


# What stands between such a pair of lines is made by `make results`.
SPEED = ("<!-- speed: made by `make results` -->", "<!-- end of speed -->")
NOISE = ("<!-- noise: made by `make results` -->", "<!-- end of noise -->")


def speed_section(reports: Mapping[str, Report], plots: Mapping[str, Sequence[str]]) -> str:
    """The README's section on speed from the reports of all machines, by the path of their folder."""
    lines = [""]
    lines.append(
        "Forward and backward, float32, warm caches: fastvae's time, and how many times as long the same takes otherwise. "
        "`compile` is `torch.compile` of the fastest plain one; *of copy* is the share of the speed at which `copy_` moves "
        "memory (more than 100% from caches), *peak* what is held beyond the inputs."
    )
    for path, found in reports.items():
        about = found["machine"]
        lines += ["", f"**{about['gpu'] or about['cpu']}**", "", *(f"{w}\n" for w in busy(found))]
        lines += _speed_table(
            found, select(found, suite="ops", cache="warm", which="both", dtype="float32")
        )
        if step_rows(found):
            lines += ["", *_step_table(found)]
        for name in plots.get(path, ()):
            if name in ("speedup.png", "growth.png"):
                lines += ["", f"![{PLOTS[name]}]({path}/{name})"]
        lines += ["", " ".join(_sentences(found))]
        noise = about["noise"]
        if noise["rows"]:
            lines.append(
                f"The same code timed twice differed by {noise['median']:.1%} in the middle, {noise['p90']:.1%} at most in nine of ten rows."
            )
        lines += [
            "",
            f"Measured on {caption(found)}, Python {about['python']}, by `{about['command']}`. [All rows]({path}/README.md).",
        ]
    return "\n".join([*lines, "", ""])


def noise_section(reports: Mapping[str, Report]) -> str:
    """What the same code, timed twice, differed by on each machine."""
    rows = []
    for found in reports.values():
        noise = found["machine"]["noise"]
        before, after = found["machine"]["copy_bandwidth_before_after"]
        if noise["rows"]:
            cells = [caption(found), str(noise["rows"]), f"{noise['median']:.1%}"]
            rows.append([*cells, f"{noise['p90']:.1%}", f"{after / before - 1:+.1%}"])
    headings = [
        "run",
        "rows",
        "off 1 in the middle",
        "in nine of ten at most",
        "copy, end to start",
    ]
    return "\n".join(["", *_table(headings, rows), "", ""])


def with_section(text: str, markers: tuple[str, str], section: str) -> str:
    """`text` with what stands between the markers replaced.

    Raises:
        ValueError: it has no markers.
    """
    before, start, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not start or not end:
        raise ValueError(f"the text lacks the markers {markers[0]!r} and {markers[1]!r}")
    return f"{before}{start}\n{section}{end}{after}"


def write_folder(
    folder: Path, found: Report, draw: Callable[[Path, Report], list[Path]]
) -> list[str]:
    """CSV, plots and page beside a folder's results.json; returns the plots' names."""
    write_csv(folder / "results.csv", found)
    plots = [path.name for path in draw(folder, found)]
    (folder / "README.md").write_text(page(found, plots))
    return plots
