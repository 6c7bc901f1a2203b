"""Devices that fastvae has no kernels for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import latents, noise

# These serve such devices, and torch.onnx.export.
OPS = {
    "elementwise_loss_composed": (3,),
    "reparameterize_composed": (noise((3, 5)),),
    "sample_and_kl_composed": (None, None, noise((3, 5)), None, 2),
}


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    tensors = [t.requires_grad_() for t in latents((3, 5)).values()]
    torch.library.opcheck(getattr(torch.ops.fastvae, name).default, (*tensors, *OPS[name]))


def test_another_device_is_served_by_torchs_own_operations():
    """Registering a device is for a whole process, so that another one does it."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("another_device.py"))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
    assert done.stderr.count("no kernels for phone") == 1, done.stderr
