"""`make results`: pages, pictures, the documentation's page on speed and the README's table, all from the stored results.json.

With ``--check`` nothing is written; the exit status is 1 where something is not what the results say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastvae.bench import plots, report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


# The README's rows, of those with forward and backward in float32.
SHAPES = ("128x784 + 128x20", "64x3x64x64 + 64x128", "64x3x64x64", "64x4096")
BASELINES = ("eager", "compile", "jax")


def stored(results: Path = RESULTS) -> dict[str, Path]:
    """The folders with a run in them, by their path from docs/speed.md."""
    return {
        f"../{path.parent.relative_to(results.parents[1])}": path.parent
        for path in sorted(results.glob("*/results.json"))
    }


def summary(reports: dict[str, report.Report]) -> str:
    """The README's table."""
    lines = [
        "",
        "Forward and backward, float32: fastvae's time, and how many times as long the others take. `eager` is the plain expression, "
        "`compile` is `torch.compile` of the fastest plain one.",
    ]
    for found in reports.values():
        both = [r for r in found["rows"] if r["suite"] in ("ops", "steps")]
        rows = {(r["op"], r["shape"], r["baseline"]): r for r in both if _is_shown(r)}
        lines += ["", f"| op, shape | fastvae | {' | '.join(BASELINES)} |", "|---" * 5 + "|"]
        for (op, shape, baseline), ours in rows.items():
            if baseline == "fastvae":
                ratios = [_times(rows.get((op, shape, b))) for b in BASELINES]
                name = (
                    op.replace("step: ", "training step, ") if "step" in op else f"`{op}` {shape}"
                )
                lines.append(
                    f"| {name} | {report.seconds(ours['median'])} | {' | '.join(ratios)} |"
                )
        lines += ["", f"Measured on {report.caption(found)}."]
    return "\n".join([*lines, "", ""])


def _is_shown(row: dict[str, Any]) -> bool:
    if row["suite"] == "steps":
        return bool(row["pass"] == "step")
    known = row["shape"] in SHAPES and "eps given" not in row["op"]
    return known and (row["dtype"], row["pass"], row["cache"]) == ("float32", "both", "warm")


def _times(row: dict[str, Any] | None) -> str:
    return f"{row['speedup']:.2f} x" if row else ""


def pages(folders: dict[str, Path]) -> dict[Path, str]:
    """The README and the pages on speed and method, with what the results say in its places."""
    reports = {name: report.read_json(folder / "results.json") for name, folder in folders.items()}
    pictures = {
        name: [plot for plot in report.PLOTS if (folder / plot).exists()]
        for name, folder in folders.items()
    }
    places = {
        ROOT / "README.md": (report.SPEED, summary(reports)),
        ROOT / "docs" / "speed.md": (report.SPEED, report.speed_section(reports, pictures)),
        ROOT / "benchmarks" / "README.md": (report.NOISE, report.noise_section(reports)),
    }
    return {
        path: report.with_section(path.read_text(), markers, section)
        for path, (markers, section) in places.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only tell whether all is up to date")
    args = parser.parse_args()
    folders = stored()
    if not args.check:
        for folder in folders.values():
            found = report.read_json(folder / "results.json")
            report.write_folder(folder, found, plots.draw_all)
    stale = [path for path, text in pages(folders).items() if text != path.read_text()]
    if args.check:
        for path in stale:
            print(
                f"{path.relative_to(ROOT)} is not what the results say: run `make results`",
                file=sys.stderr,
            )
        return int(bool(stale))
    for path, text in pages(folders).items():
        path.write_text(text)
    print(f"{len(folders)} machines: {', '.join(folders)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
