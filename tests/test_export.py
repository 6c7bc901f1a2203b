"""torch.export of a model's inference path and of its objective, saved, and loaded elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import noise, vae_inputs
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fastvae
from fastvae.nn import Reparameterize, VAELoss


class Generate(nn.Module):
    """Images to reconstructions from a sample of their posterior, and its KL."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(40, 12)
        self.sample = Reparameterize()
        self.decoder = nn.Sequential(nn.Linear(6, 40), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        kl = fastvae.kl_normal(mu, logvar, reduction="sample")
        return self.decoder(self.sample(mu, logvar)), kl


def exported(training: bool = False) -> tuple[Generate, ExportedProgram]:
    torch.manual_seed(1)
    model = Generate().train(training)
    batch = Dim("batch", min=2, max=512)
    return model, torch.export.export(model, (noise((4, 40)),), dynamic_shapes=({0: batch},))


def targets(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if "fastvae" in str(n.target)]


def test_the_inference_path(tmp_path):
    """Another batch size, from the file, with the noise of the seed; each op is one node."""
    model, program = exported()
    torch.export.save(program, tmp_path / "vae.pt2")
    loaded = torch.export.load(tmp_path / "vae.pt2")
    assert len(targets(loaded)) == 2
    for batch in (4, 7):
        x = noise((batch, 40))
        torch.manual_seed(6)
        want = model(x)
        torch.manual_seed(6)
        torch.testing.assert_close(loaded.module()(x), want)
        assert not torch.equal(loaded.module()(x)[0], want[0]), "the next call draws anew"


@pytest.mark.parametrize(
    "options",
    [{"beta": 0.3}, {"reduction": "sample"}, {"reduction": "mean", "kl_reduction": "sum"}],
)
def test_the_loss(options, tmp_path):
    loss, tensors = VAELoss(**options), vae_inputs((4, 3, 5))
    batch = Dim("batch")
    shapes = {k: {0: batch} for k in tensors}
    program = torch.export.export(loss, (), kwargs=tensors, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "loss.pt2")
    loaded = torch.export.load(tmp_path / "loss.pt2").module()
    for batch_size in (4, 9):
        tensors = vae_inputs((batch_size, 3, 5))
        got = loaded(**tensors)
        assert isinstance(got, fastvae.VAELossOutput)
        torch.testing.assert_close(got, loss(**tensors))


def test_a_training_program():
    """Exported before autograd, with the objective and its gradients."""
    tensors = vae_inputs((4, 30))
    program = torch.export.export(VAELoss(0.3), (), kwargs=tensors)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    got = torch.autograd.grad(program.module()(**leaves).loss, list(leaves.values()))
    want = torch.autograd.grad(VAELoss(0.3)(**leaves).loss, list(leaves.values()))
    torch.testing.assert_close(got, want)


IN_ANOTHER_PROCESS = """
import json, sys, torch
torch.set_default_device(sys.argv[2])
import fastvae  # registers the ops
model = torch.export.load(sys.argv[1]).module()
torch.manual_seed(6)
recon_x, kl = model(torch.linspace(-1, 1, 120).view(3, 40))
print(json.dumps([recon_x.tolist(), kl.tolist()]))
"""


@pytest.mark.slow
def test_loaded_in_another_process(tmp_path):
    model, program = exported()
    path = tmp_path / "vae.pt2"
    torch.export.save(program, path)
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(path), str(torch.get_default_device())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(6)
    want = model(torch.linspace(-1, 1, 120).view(3, 40))
    for got, w in zip(json.loads(done.stdout), want, strict=True):
        torch.testing.assert_close(torch.tensor(got), w)


@pytest.mark.slow
def test_a_package_of_aotinductor(tmp_path: Path) -> None:
    model, program = exported()
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "vae.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for batch in (4, 7):
        x = noise((batch, 40))
        torch.manual_seed(6)
        want = model(x)
        torch.manual_seed(6)
        torch.testing.assert_close(tuple(run(x)), want)
        assert not torch.equal(run(x)[0], want[0])


IN_A_NEW_PROCESS = """
import sys, torch
import fastvae
checkpoint = torch.load(sys.argv[1], weights_only=True)
recipe, output = checkpoint["hyper_parameters"]["recipe"], checkpoint["last"]
learned = checkpoint["hyper_parameters"]["learned"].options
assert type(learned["likelihood"]) is fastvae.likelihoods.Laplace and learned["beta"] == 0.25, learned
assert isinstance(learned["likelihood"].log_scale, torch.nn.Parameter) and learned["likelihood"].log_scale.item() == 0.5, learned
assert recipe == fastvae.recipes.pytorch_vae(0.3) and type(recipe) is fastvae.recipes.Recipe, recipe
assert type(output) is fastvae.VAELossOutput and output.kl.item() == 3.0, output
"""


def test_a_checkpoint_with_our_types(tmp_path):
    """As Lightning's save_hyperparameters keeps a recipe; torch.load takes weights_only=True by default."""
    path = tmp_path / "last.ckpt"
    output = fastvae.VAELossOutput(*map(torch.tensor, (1.0, 2.0, 3.0)))
    recipe = fastvae.recipes.pytorch_vae(0.3)
    learned = fastvae.recipes.latent_diffusion(torch.nn.Parameter(torch.tensor(0.5)), 0.25)
    hyper_parameters = {"recipe": recipe, "learned": learned}
    torch.save({"hyper_parameters": hyper_parameters, "last": output}, path)
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
