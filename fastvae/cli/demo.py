"""``fastvae demo``: train a VAE, draw what it has learned, compare with plain PyTorch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastvae
from fastvae import VAELossOutput
from fastvae.demo import data, model, train

# Whatever its loss says, a model beyond these has learned the mean image or the prior, no more.
LARGEST_ERROR_RATIO = 0.5
SMALLEST_KL = 3.0
ADVICE = "more --epochs or a smaller --sigma may help"

# The demo extra: modules, and what pip calls them.
EXTRA = {"PIL": "pillow", "matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}

DESCRIPTION = """\
Train a variational autoencoder with fastvae's objective, and beside it one with the objective in
plain PyTorch and the same noise. Check that the curves agree. Write pictures and metrics.json.
Processes started by torchrun share each batch and train as one would.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``demo`` and its options to the command line's `subparsers`."""
    parser = subparsers.add_parser(
        "demo",
        help="train a VAE on real images, draw what it learned, compare with plain PyTorch",
        description=DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, absent = parser.add_argument, argparse.SUPPRESS  # not None: the help shows defaults
    add("--data", default="digits", help="digits, an .npz file, or a folder of pictures")
    add("--image-size", type=int, default=32, help="side of a folder's images, in pixels")
    for item in fields(train.Config):
        name = "--" + item.name.replace("_", "-")
        add(name, type=type(item.default), default=item.default, **item.metadata)
    add("--out", type=Path, default=Path("demo"), help="the folder to write to")
    add("--json", type=Path, default=absent, help="a file: write the metrics there as well")
    add("--no-compare", action="store_true", default=absent, help="leave out plain PyTorch")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; the exit status is 0, or 1 after a line on stderr that says what is wrong."""
    try:
        config = train.Config(**{i.name: getattr(args, i.name) for i in fields(train.Config)})
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
            if config.device == "cuda":
                config = replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
            dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo")
        return _run(args, config)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRA:
            raise
        return _fail(f"needs {EXTRA[module]}: pip install {' '.join(EXTRA.values())}")
    except (ValueError, OSError) as error:
        return _fail(str(error))
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _run(args: argparse.Namespace, config: train.Config) -> int:
    # Whatever is missing or wrong comes up here, before the training.
    from fastvae.demo import pictures

    rank, processes = train.ranks()
    if args.data == "digits":
        # Steps this small gain little from more, and lose much where the cores are shared.
        torch.set_num_threads(1)
    try:
        probe = torch.zeros(1, 1, device=config.device)
        fastvae.reparameterize(probe, probe)
    except (RuntimeError, AssertionError) as error:  # torch, or fastvae, without that device
        raise ValueError(str(error)) from error
    images = data.load(args.data, image_size=args.image_size)
    images = replace(images, images=images.images.to(probe.device))
    training, testing = images.images.tensor_split([images.cut])
    shape = training.shape[1:]
    files = [args.out / "metrics.json", *([args.json] if "json" in args else [])]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)

    objectives = {"fastvae": model.fused, "plain PyTorch": model.plain}
    if "no_compare" in args:
        del objectives["plain PyTorch"]
    models = {n: train.build_model(config, shape, o) for n, o in objectives.items()}
    histories = train.train(config, models, training)
    ours, plain = histories["fastvae"], histories.get("plain PyTorch")
    if not ours.epochs.isfinite().all():
        return _fail("the training diverged, its loss is not finite: try a smaller --lr")
    if rank > 0:
        return 0  # every process has the same model and history; the first one tells
    trained = models["fastvae"]
    agreement = train.agreement(ours, plain) if plain else None
    test = train.evaluate(config, trained, testing)
    # Of predicting the training images' mean, whatever the input.
    baseline = (testing - training.mean(0)).square().flatten(1).sum(1).mean().item()
    ratio = test["recon"] / baseline
    looks = pictures.draw_all(args.out, config, trained, images, histories)
    metrics = {
        "version": fastvae.__version__,
        "torch": torch.__version__,
        "processes": processes,
        "config": {"data": args.data, **asdict(config), "beta": config.beta},
        "images": {"train": len(training), "test": len(testing), "shape": list(shape)},
        "train": train.evaluate(config, trained, training),
        "test": test,
        "mean_image": {"error": baseline, "ratio": ratio},
        "agreement": agreement,
        "step_seconds": {n: h.seconds.median().item() for n, h in histories.items()},
        "epochs": {n: VAELossOutput(*h.epochs.T.tolist())._asdict() for n, h in histories.items()},
        "pictures": [str(path) for path in looks],
    }
    for file in files:
        file.write_text(json.dumps(metrics, indent=2) + "\n")

    count, size = len(images.images), " x ".join(map(str, shape))
    rows = [
        ("images", f"{images.name}: {count} of {size}, {len(testing)} of them to test with"),
        ("note", images.note),
        ("model", f"{config.latent_dim} latent dimensions, {config.epochs} epochs"),
        ("test error", f"{test['recon']:.3f} squared error per image"),
        ("mean image", f"{baseline:.3f}, so the model's is {ratio:.2f} of that"),
        ("KL", f"{test['kl']:.2f} nats per image (beta = 2 sigma^2 = {config.beta:g})"),
        ("ELBO", f"{test['elbo']:.2f} nats per image for sigma = {config.sigma:g}"),
    ]
    if agreement and plain:
        steps = f"{agreement['first_steps']:.1e} in the first {train.FIRST_STEPS} steps"
        epochs = f"{agreement['epochs']:.1e} in the means of the epochs"
        limits = f"limits {train.FIRST_STEPS_TOLERANCE:g} and {train.EPOCHS_TOLERANCE:g}"
        rows.append(("difference", f"from plain PyTorch's losses {steps}, {epochs} ({limits})"))
        a, b = (1e3 * h.seconds.median().item() for h in (ours, plain))
        text = f"{a:.2f} ms with fastvae, {b:.2f} ms in plain PyTorch ({b / a:.2f}x)"
        rows.append(("training step", f"{text}, the networks and Adam included"))
    rows.append(("metrics", str(files[0])))
    rows += [("look at", f"{path}: {look}") for path, look in looks.items()]
    print("\n".join(f"{label:<15}{text}" for label, text in rows if text))

    problems = []
    if not ratio <= LARGEST_ERROR_RATIO:
        problems.append(f"the error is above {LARGEST_ERROR_RATIO} of the mean image's")
    if not test["kl"] >= SMALLEST_KL:
        problems.append(f"the posterior has collapsed to the prior: a KL below {SMALLEST_KL} nats")
    fails = args.data == "digits"  # other images may simply be harder
    for problem in problems:
        _fail(f"{'' if fails else 'warning: '}{problem}; {ADVICE}")
    if agreement and not agreement["ok"]:
        return _fail("fastvae and plain PyTorch disagree: a difference above is beyond its limit")
    return int(bool(problems) and fails)


def _fail(message: str) -> int:
    print(f"fastvae demo: {message}", file=sys.stderr)
    return 1
