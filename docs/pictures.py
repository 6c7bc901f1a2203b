"""`make pictures`: runs the demo and the examples and stores what they draw in docs/pictures, small enough for a repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
WIDEST, MOST_BYTES = 1200, 150_000
# A command, and the name here of each picture that it draws. {out} is a folder.
COMMANDS: list[tuple[str, dict[str, str]]] = [
    (
        "-m fastvae demo --out {out}",
        {
            name: f"demo-{name}"
            for name in ("reconstructions.png", "samples.png", "latent.png", "curves.png")
        },
    ),
    (
        "examples/disentangle.py --fastvae --epochs 100 --picture {out}/latents.png",
        {"latents.png": "disentangle.png"},
    ),
    (
        "examples/single_cell.py --fastvae --plot {out}/cells.png",
        {"cells.png": "single-cell.png"},
    ),
]


def shrink(source: Path, target: Path) -> None:
    """At most WIDEST pixels across, with a palette, which a drawing does not need more than."""
    image = Image.open(source).convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    picture = Image.alpha_composite(page, image).convert("RGB")
    picture.thumbnail((WIDEST, 10 * WIDEST))
    picture.quantize(256).save(target, optimize=True)
    if (size := target.stat().st_size) > MOST_BYTES:
        raise SystemExit(f"{target.name} has {size} bytes: more than {MOST_BYTES}")


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for command, names in COMMANDS:
        with tempfile.TemporaryDirectory() as out:
            arguments = command.format(out=out).split()
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            subprocess.run(
                [sys.executable, *arguments],
                check=True,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": path},
            )
            for drawn, name in names.items():
                shrink(Path(out) / drawn, PICTURES / name)
                print(f"docs/pictures/{name}")


if __name__ == "__main__":
    main()
