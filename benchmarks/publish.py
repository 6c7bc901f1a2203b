"""`make results`: the pages, pictures and the README's section on speed, all from the stored results.json.

With ``--check`` nothing is written; the exit status is 1 where something is not what the results say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastvae.bench import plots, report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def stored(results: Path = RESULTS) -> dict[str, Path]:
    """The folders with a run in them, by their path from the README."""
    return {
        str(path.parent.relative_to(results.parents[1])): path.parent
        for path in sorted(results.glob("*/results.json"))
    }


def pages(folders: dict[str, Path]) -> dict[Path, str]:
    """The README and the page on method, with what the results say in its places."""
    reports = {name: report.read_json(folder / "results.json") for name, folder in folders.items()}
    pictures = {
        name: [plot for plot in report.PLOTS if (folder / plot).exists()]
        for name, folder in folders.items()
    }
    places = {
        ROOT / "README.md": (report.SPEED, report.speed_section(reports, pictures)),
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
