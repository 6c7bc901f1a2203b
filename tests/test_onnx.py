"""torch.onnx.export of encoders and losses, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from accuracy import OUTPUTS
from cases import REDUCTIONS, inputs, latents, noise, tensor
from torch import Tensor, nn

import fastvae

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*The axis name"),
]
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Call(nn.Module):
    """An op with its options, as a model of the tensors of these names."""

    def __init__(self, op: str, names: Iterable[str], **options: Any) -> None:
        super().__init__()
        self.op, self.names, self.options = op, list(names), options

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        result = getattr(fastvae, self.op)(**given, **self.options)
        return (result,) if isinstance(result, Tensor) else tuple(result)


def run_both(
    name: str, at_export: dict[str, Tensor], tensors: dict[str, Tensor], **options: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What onnxruntime and what eager gives for `tensors`."""
    model = Call(name, tensors, **options)
    program = exported(model, list(at_export.values()))
    return tuple(program(list(tensors.values()))), model(list(tensors.values()))


def exported(model: nn.Module, *args: Any) -> torch.onnx.ONNXProgram:
    """With a batch size that is open."""
    batches = torch.utils._pytree.tree_map(lambda t: {0: torch.export.Dim("batch")}, args)
    program = torch.onnx.export(
        model.eval(), args, dynamo=True, dynamic_shapes=batches, verbose=False
    )
    assert program is not None
    return program


CASES = [("reparameterize", {}, False), ("vae_loss", {"beta": 0.3, "kl_reduction": "sum"}, False)]
CASES += [("kl_normal", {"reduction": r}, prior) for r in REDUCTIONS for prior in (False, True)]
CASES += [("sample_and_kl", {"reduction": r}, True) for r in ("batchmean", "sample")]
CASES += [("reconstruction_loss", {"reduction": r}, False) for r in REDUCTIONS]
CASES += [("reconstruction_loss", {"likelihood": "gaussian"}, False)]
CASES += [("vae_loss", {"reduction": r, "beta": 0.3}, False) for r in REDUCTIONS[:-1]]


@pytest.mark.parametrize(("name", "options", "prior"), CASES, ids=str)
def test_the_numbers_are_those_of_eager(name, options, prior):
    """For another batch size than that of the export."""
    more = {"prior": True} if prior else {}
    got, want = run_both(
        name, inputs(name, (4, 7), **more), inputs(name, (9, 7), **more), **options
    )
    assert len(got) == len(OUTPUTS[name])
    torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float16, 1e-3)], ids=str)
@pytest.mark.parametrize("name", OUTPUTS)
def test_other_dtypes(name, dtype, rtol):
    """(The exporter rounds a formula's constants to float32, of float64 too.)"""
    tensors = inputs(name, (4, 7), dtype)
    got, want = run_both(name, tensors, tensors)
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("prior", [False, True])
def test_the_kl_keeps_its_digits_near_the_prior(prior):
    """onnx has no expm1: exp(x) - 1 - x is 0 or noise here."""
    tensors = {"mu": torch.zeros(2, 3), "logvar": tensor([[1e-3] * 3] * 2, torch.float32)}
    if prior:
        tensors |= {"mu_p": torch.zeros(2, 3), "logvar_p": torch.zeros(2, 3)}
    (kl,), _ = run_both("kl_normal", tensors, tensors, reduction="mean")
    torch.testing.assert_close(kl, torch.tensor(2.50083354e-7), rtol=1e-6, atol=0)


class Encoder(nn.Module):
    """A model that draws for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 12)
        self.sample = fastvae.nn.Reparameterize()
        self.generator = torch.Generator()  # which the runtime does not have

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mu, logvar = self.layer(x).chunk(2, dim=1)
        z, eps = fastvae.reparameterize(mu, logvar, generator=self.generator, return_eps=True)
        with_kl, _ = fastvae.sample_and_kl(mu, logvar, generator=self.generator)
        return self.sample(mu, logvar), with_kl, z, eps


def test_noise_is_drawn_by_the_runtime():
    model, x = Encoder(), noise((2000, 20))
    program = exported(model, x)
    with torch.no_grad():
        mu, logvar = model.layer(x).chunk(2, dim=1)
    sample, with_kl, z, eps = program(x)
    torch.testing.assert_close(z, fastvae.reparameterize(mu, logvar, eps=eps), rtol=1e-4, atol=1e-5)
    for draw in (sample, with_kl, z):
        e = (draw - mu) * torch.exp(-0.5 * logvar)
        assert abs(e.mean()) < 0.05
        assert abs(e.std() - 1) < 0.05
    assert not torch.equal(sample, z)
    assert not torch.equal(with_kl, z)
    assert not torch.equal(program(x)[0], sample), "the next call draws anew"


def test_the_loss_as_a_module():
    loss, tensors = fastvae.nn.VAELoss(0.3), inputs("vae_loss", (4, 7))
    program = exported(loss, *tensors.values())
    torch.testing.assert_close(tuple(program(*tensors.values())), tuple(loss(**tensors)))


def test_a_density_with_a_clamp():
    class Model(nn.Module):
        def forward(self, z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
            return fastvae.DiagonalGaussian(mu, logvar, clamp=(-1.0, 0.5)).nll(z)

    tensors = [noise((4, 7)), *latents((4, 7)).values()]
    program = exported(Model(), *tensors)
    torch.testing.assert_close(program(*tensors)[0], Model()(*tensors))


def test_full_covariance():
    class Model(nn.Module):
        def forward(self, mu: Tensor, factor: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
            return fastvae.sample_and_kl_multivariate_normal(mu, factor, eps=eps)

    factor = torch.tril(0.1 * noise((4, 7, 7)), -1) + torch.diag_embed(noise((4, 7)).exp())
    tensors = [noise((4, 7)), factor, noise((4, 7))]
    torch.testing.assert_close(tuple(exported(Model(), *tensors)(*tensors)), Model()(*tensors))


def test_export_by_itself_is_as_it_was():
    """The flag of the onnx export does not outlive it."""
    model, tensors = Call("kl_normal", ["mu", "logvar"]), list(latents((4, 7)).values())
    exported(model, tensors)
    program = torch.export.export(model, (tensors,))
    assert [
        n for n in program.graph.nodes if n.target is torch.ops.fastvae.elementwise_loss.default
    ]
