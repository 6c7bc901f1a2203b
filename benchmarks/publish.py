"""`make results`: pages, pictures, the documentation's page on speed and the README's table, all from the stored results.json.

With ``--check`` nothing is written; the exit status is 1 where something is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from fastvae.bench import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BASELINES = ("fastvae", "eager", "compile", "jax")
SHAPES = ("128x784 + 128x20", "64x3x64x64", "64x4096", "128x4000", "1024x32")


def stored(results: Path = RESULTS) -> dict[str, Path]:
    """The folders with a run in them, by their path from docs/."""
    return {
        f"../{path.parent.relative_to(results.parents[1])}": path.parent
        for path in sorted(results.glob("*/results.json"))
    }


def speed(folders: dict[str, Path]) -> str:
    """The section of docs/speed.md: training steps first, then the ops."""
    parts = ["fastvae's time, and how many times as long the same takes otherwise."]
    for name, folder in folders.items():
        found = json.loads((folder / "results.json").read_text())
        for section in report.sections(found):
            title, _, text = section.partition("\n")
            if title in (report.SUITES["steps"], report.SUITES["ops"]):
                parts += [f"**{title}**\n{text}"]
        pictures = [plot for plot in ("steps.png", "growth.png") if (folder / plot).exists()]
        parts += [f"![{report.PLOTS[plot]}]({name}/{plot})" for plot in pictures]
        parts += ["\n".join(f"* {line}" for line in report.notes(found))]
        parts += [f"[All tables]({name}/README.md)"]
    return "\n\n".join(parts)


def summary(folders: dict[str, Path]) -> str:
    """The README's table: training steps, and one size of each op."""
    parts = [
        "fastvae's time (ops: forward and backward, float32), and how many times as long the others take. `eager` is the plain "
        "expression or the project's own code, `compile` is `torch.compile` of the fastest of these."
    ]
    for folder in folders.values():
        found = json.loads((folder / "results.json").read_text())
        frame = report.rows_of(found).query("baseline in @BASELINES")
        ops = frame[(frame["pass"] == "both") & (frame.dtype == "float32")].query(
            "suite in ['ops', 'likelihoods', 'terms', 'pairs'] and shape in @SHAPES"
        )
        cells = report.table(pd.concat([frame.query("suite == 'steps'"), ops]))
        cells = cells[[c for c in ("op", "shape", *BASELINES) if c in cells]]
        parts += [cells.to_markdown(index=False, disable_numparse=True)]
        parts += [f"Measured on {report.caption(found)}."]
    return "\n\n".join(parts)


def noise(folders: dict[str, Path]) -> str:
    """What the same code, timed twice, differed by on each machine."""
    every = [json.loads((folder / "results.json").read_text()) for folder in folders.values()]
    lines = [list(report.notes(found)) for found in every]
    return "\n".join(f"* {n[0]}. {line}" for n in lines for line in n if line.startswith("Noise"))


def pages(folders: dict[str, Path]) -> dict[Path, str]:
    """The README and the pages on speed and method, with what the results say between their markers."""
    found = {}
    for path, name, text in (
        (ROOT / "README.md", "speed", summary(folders)),
        (ROOT / "docs" / "speed.md", "speed", speed(folders)),
        (ROOT / "benchmarks" / "README.md", "noise", noise(folders)),
    ):
        start, end = f"<!-- {name}: made by `make results` -->\n", f"<!-- end of {name} -->"
        before, _, rest = path.read_text().partition(start)
        if end not in rest:
            raise ValueError(f"{path} lacks the markers {start.strip()!r} and {end!r}")
        found[path] = f"{before}{start}\n{text}\n\n{end}{rest.partition(end)[2]}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only tell whether all is up to date")
    args = parser.parse_args()
    folders = stored()
    if not args.check:
        for folder in folders.values():
            report.write_folder(folder, json.loads((folder / "results.json").read_text()))
    stale = {path: text for path, text in pages(folders).items() if text != path.read_text()}
    for path, text in stale.items():
        if args.check:
            name = path.relative_to(ROOT)
            print(f"{name} is not what the results say: run `make results`", file=sys.stderr)
        else:
            path.write_text(text)
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
