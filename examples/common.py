"""What the examples share: the images and the command line. Model, objective and loop are each example's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor


def digits() -> Tensor:
    """Scikit-learn's handwritten digits, [1797, 1, 8, 8] in [0, 1]; random patterns where it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        print("scikit-learn is not installed: random patterns instead of digits", file=sys.stderr)
        return torch.sigmoid(torch.randn(1797, 4) @ torch.randn(4, 64)).view(-1, 1, 8, 8)
    images: Tensor = torch.as_tensor(load_digits().images, dtype=torch.get_default_dtype())
    return images.unsqueeze(1) / 16


def main(train: Callable[[bool, int], list[float]]) -> None:
    """Trains with the objective that --fastvae chooses, and prints the loss of every step, a line for an epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fastvae", action="store_true", help="with fastvae's objective")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    losses = train(args.fastvae, args.epochs)
    steps = len(losses) // args.epochs
    for epoch in range(args.epochs):
        print(f"epoch {epoch + 1}:", *(f"{loss:.4g}" for loss in losses[epoch * steps :][:steps]))
