"""``fastvae demo``: train a VAE, draw what it has learned, compare with plain PyTorch."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastvae
from fastvae import VAELossOutput
from fastvae.demo import data, objectives, train
from fastvae.demo.model import Autoencoder

__all__ = ["add_parser", "run"]

# Whatever its loss says, a model beyond these has learned the mean image or the prior, no more.
LARGEST_ERROR_RATIO = 0.5
SMALLEST_KL = 3.0

# The demo extra: modules, and what pip calls them.
EXTRA = {"PIL": "pillow", "matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}


def add_parser(subparsers: Any) -> None:
    """Add ``demo`` and its options to the command line's `subparsers`."""
    parser = subparsers.add_parser(
        "demo",
        help="train a VAE on real images, draw what it learned, compare with plain PyTorch",
        description=(
            "Train a variational autoencoder with fastvae's objective and write pictures and "
            "metrics.json; train it again with the objective in plain PyTorch and the same noise, "
            "and check that the curves agree. Under torchrun (torchrun --nproc-per-node 2 -m fastvae "
            "demo) the processes share each batch and train as one would."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = train.Config()
    count, positive = _number(int, at_least=1), _number(float, above=0)
    add = parser.add_argument
    add(
        "--data",
        default="digits",
        metavar="SOURCE",
        help=(
            "digits (scikit-learn's), an .npz or .npy file, or a folder of images (sub-folders, if any, "
            "are the classes); arrays or folders of train and test images are used as that"
        ),
    )
    absent = argparse.SUPPRESS  # instead of None or False, which the help would show as defaults
    add(
        "--key",
        default=absent,
        metavar="NAME",
        help="the array of the images in an .npz file (default: x, images, data and the like)",
    )
    add(
        "--label-key",
        default=absent,
        metavar="NAME",
        help="the array of the labels, '' for none (default: y, labels, targets and the like)",
    )
    add("--image-size", type=count, default=32, help="side of a folder's images, in pixels")
    add(
        "--model",
        choices=("vae", "ae"),
        default=default.model,
        help="variational, or the deterministic autoencoder",
    )
    add(
        "--noise",
        type=_number(float, at_least=0),
        default=default.noise,
        help="standard deviation of noise added to the input; the target stays clean",
    )
    add(
        "--sigma",
        type=positive,
        default=default.sigma,
        help="standard deviation of the decoder's Gaussian; beta = 2 sigma^2",
    )
    add("--latent-dim", type=count, default=default.latent_dim, help="latent dimensions")
    add("--hidden", type=count, default=default.hidden, help="units of a hidden layer")
    add("--epochs", type=count, default=default.epochs, help="passes over the images")
    add("--batch-size", type=count, default=default.batch_size, help="images in a step")
    add("--lr", type=positive, default=default.lr, help="Adam's learning rate")
    add(
        "--seed",
        type=_number(int, at_least=0),
        default=default.seed,
        help="of the weights, the order of the images and the noise",
    )
    add(
        "--threads",
        type=count,
        default=absent,
        help="CPU threads (default: 1 for the digits, torch's choice for other images)",
    )
    add("--device", default=default.device, help="cpu, cuda, cuda:1, ...")
    add("--out", type=Path, default=Path("demo"), metavar="FOLDER", help="where to write")
    add(
        "--json",
        type=Path,
        default=absent,
        metavar="FILE",
        help="write the metrics to FILE as well",
    )
    add(
        "--no-compare",
        action="store_true",
        default=absent,
        help="leave out the training with plain PyTorch",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; the exit status is 0, or 1 after a line on stderr that says what is wrong."""
    config = train.Config(**{item.name: getattr(args, item.name) for item in fields(train.Config)})
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return _run(args, config)
    # Started by torchrun.
    if config.device == "cuda":
        config = replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
    dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo")
    try:
        return _run(args, config)
    finally:
        dist.destroy_process_group()


def _run(args: argparse.Namespace, config: train.Config) -> int:
    start = time.perf_counter()
    rank, processes = train.ranks()
    if "threads" in args:
        torch.set_num_threads(args.threads)
    elif args.data == "digits":
        # Steps this small gain little from more, and lose much where the cores are shared.
        torch.set_num_threads(1)
    try:
        # Whatever is missing or wrong comes up here, before the training.
        import tqdm  # noqa: F401

        from fastvae.demo import pictures

        probe = torch.zeros(1, 1, device=config.device)
        fastvae.reparameterize(probe, probe)
        keys = {name: getattr(args, name, None) for name in ("key", "label_key")}
        images = data.load(args.data, image_size=args.image_size, **keys).to(probe.device)
        for folder in [args.out, *([args.json.parent] if "json" in args else [])]:
            folder.mkdir(parents=True, exist_ok=True)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRA:
            raise
        return _fail(f"needs {EXTRA[module]}: pip install {' '.join(EXTRA.values())}")
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        # AssertionError is what torch raises for a CUDA device where it was built without CUDA.
        return _fail(str(error))

    for note in images.notes if rank == 0 else ():
        _row(*note)
    model, ours = _train("fastvae", config, images, objectives.fused)
    if not ours.epochs.isfinite().all():
        return _fail("the training diverged, its loss is not finite: try a smaller --lr")
    plain = agreement = times = None
    if "no_compare" not in args:
        _, plain = _train("plain PyTorch", config, images, objectives.plain, given_noise=True)
        agreement = train.agreement(ours, plain)
    if rank > 0:
        return 0  # every process has the same model and history; the first one tells
    if plain is not None and processes == 1:
        times = train.step_times(config, images)
    test = train.evaluate(config, model, images.test)
    baseline = train.mean_image_error(images)
    paths = pictures.draw_all(args.out, config, model, images, ours, plain)

    metrics = {
        "version": fastvae.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "config": {"data": args.data, **asdict(config), "beta": config.beta},
        "images": {
            "train": len(images.train),
            "test": len(images.test),
            "shape": list(images.shape),
        },
        "train": asdict(train.evaluate(config, model, images.train)),
        "test": asdict(test),
        "mean_image": {"error": baseline, "ratio": test.recon / baseline},
        "agreement": None if agreement is None else {**asdict(agreement), "ok": agreement.ok},
        "step_seconds": None if times is None else {k: asdict(v) for k, v in times.items()},
        "epochs": {"fastvae": _columns(ours), "plain": None if plain is None else _columns(plain)},
        "pictures": [str(path) for path in paths],
        "seconds": time.perf_counter() - start,
    }
    text = json.dumps(metrics, indent=2) + "\n"
    try:
        (args.out / "metrics.json").write_text(text)
        if "json" in args:
            args.json.write_text(text)
    except OSError as error:
        return _fail(str(error))

    _print_summary(config, images, test, baseline, agreement, times, paths)
    status = 0
    for problem in _collapse(test, baseline):
        # For the digits it is known what can be reached; other images may simply be harder.
        if args.data == "digits":
            status = _fail(problem)
        else:
            print(f"fastvae demo: warning: {problem}", file=sys.stderr)
    if agreement is not None and not agreement.ok:
        status = _fail(
            f"fastvae and plain PyTorch disagree: the first {train.FIRST_STEPS} steps by "
            f"{agreement.first_steps:.1e} (limit {train.FIRST_STEPS_TOLERANCE:g}), the epochs' "
            f"means by {agreement.epochs:.1e} (limit {train.EPOCHS_TOLERANCE:g}); if the first steps "
            "agree, a smaller --lr keeps roundings from growing"
        )
    return status


def _train(
    label: str,
    config: train.Config,
    images: data.Dataset,
    objective: objectives.Objective,
    *,
    given_noise: bool = False,
) -> tuple[Autoencoder, train.History]:
    """Train a fresh model, with a progress bar where stderr is a terminal."""
    from tqdm import tqdm

    model = train.build_model(config, images.shape)
    hidden = True if train.ranks()[0] > 0 else None  # None: where stderr is no terminal
    with tqdm(desc=label, total=config.epochs, unit="epoch", disable=hidden) as bar:

        def on_epoch(means: VAELossOutput) -> None:
            bar.set_postfix(loss=f"{means.loss:.4f}", refresh=False)
            bar.update()

        history = train.train(
            config, model, images.train, objective, given_noise=given_noise, on_epoch=on_epoch
        )
    return model, history


def _columns(history: train.History) -> dict[str, list[float]]:
    return dict(zip(VAELossOutput._fields, history.epochs.T.tolist(), strict=True))


def _collapse(test: train.Evaluation, baseline: float) -> list[str]:
    """What is wrong with a model that has learned no more than the mean image."""
    problems = []
    if not test.recon <= LARGEST_ERROR_RATIO * baseline:
        problems.append(
            f"the model has not learned the images: its test error of {test.recon:.3f} is above "
            f"{LARGEST_ERROR_RATIO:g} of the mean image's {baseline:.3f}; "
            "more --epochs or a smaller --sigma may help"
        )
    if test.kl is not None and not test.kl >= SMALLEST_KL:
        problems.append(
            f"the posterior has collapsed to the prior: a KL of {test.kl:.2f} nats is below "
            f"{SMALLEST_KL:g}; more --epochs or a smaller --sigma may help"
        )
    return problems


def _print_summary(
    config: train.Config,
    images: data.Dataset,
    test: train.Evaluation,
    baseline: float,
    agreement: train.Agreement | None,
    times: dict[str, train.StepTime] | None,
    paths: list[Path],
) -> None:
    kind = {"vae": "variational autoencoder", "ae": "deterministic autoencoder"}[config.model]
    size = " x ".join(str(length) for length in images.shape)

    _row("model", f"{kind}, {config.latent_dim} latent dimensions, {config.epochs} epochs")
    _row("images", f"{images.name}: {len(images.train):,} train, {len(images.test):,} test, {size}")
    _row("test error", f"{test.recon:.3f} squared error per image")
    _row("mean image", f"{baseline:.3f}, so the model's is {test.recon / baseline:.2f} of that")
    if test.kl is not None:
        _row("KL", f"{test.kl:.2f} nats per image (beta = 2 sigma^2 = {config.beta:g})")
        _row("ELBO", f"{test.elbo:.2f} nats per image for sigma = {config.sigma:g}")
    if agreement is not None:
        _row(
            "agreement",
            f"first {train.FIRST_STEPS} steps to {agreement.first_steps:.1e} "
            f"(limit {train.FIRST_STEPS_TOLERANCE:g}), "
            f"epochs to {agreement.epochs:.1e} (limit {train.EPOCHS_TOLERANCE:g})",
        )
    if times is not None:
        ours, plain = times["fastvae"].median * 1e3, times["plain"].median * 1e3
        _row(
            "training step",
            f"{ours:.2f} ms with fastvae, {plain:.2f} ms in plain PyTorch ({plain / ours:.2f}x), "
            "the networks and Adam included",
        )
    _row("written", f"metrics.json, {', '.join(path.name for path in paths)} in {paths[0].parent}")


def _row(label: str, text: str) -> None:
    print(f"{label:<15}{text}")


def _fail(message: str) -> int:
    print(f"fastvae demo: {message}", file=sys.stderr)
    return 1


def _number(
    kind: type[int] | type[float], *, at_least: float = -math.inf, above: float = -math.inf
) -> Callable[[str], float]:
    """An argparse type: a finite number of `kind` in the range given."""

    def parse(text: str) -> float:
        value = kind(text)  # argparse reports a ValueError
        if not (at_least <= value < math.inf and value > above):
            limit = f"above {above:g}" if above > -math.inf else f"of at least {at_least:g}"
            raise argparse.ArgumentTypeError(f"needs a number {limit}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type by it
    return parse
