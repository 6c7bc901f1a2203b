"""A device that fastvae has no kernels for, and what it does there. test_devices.py runs this in a process of its own.

The device is called phone. Its tensors have a tensor on the CPU each, with which torch's own operations run; it refuses
every other operation, as MPS does.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import OUTPUTS, check, evaluate
from cases import DTYPES, REDUCTIONS, inputs, latents, noise, vae_inputs
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import fastvae

_setup_privateuseone_for_python_backend("phone")
on_cpu: dict[int, tuple[torch.Tensor, torch.UntypedStorage]] = {}  # with what keeps the key alive


def to_phone(value):
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return value
    t = torch._C._acc.create_empty_tensor(value.shape, value.dtype)  # contiguous
    on_cpu[t.untyped_storage()._cdata] = (value.contiguous(), t.untyped_storage())
    return t


def from_phone(value):
    if isinstance(value, torch.Tensor) and value.device.type == "phone":
        return on_cpu[value.untyped_storage()._cdata][0]
    return "cpu" if isinstance(value, torch.device) else value


def run(op, *args, **kwargs):
    if op.namespace != "aten":
        raise NotImplementedError(f"phone has no {op}")
    args, kwargs = tree_map(from_phone, args), tree_map(from_phone, kwargs)
    if op is torch.ops.aten._copy_from.default:
        source, destination = args
        return to_phone(destination.copy_(source))
    return tree_map(to_phone, op(*args, **kwargs))


library = torch.library.Library("_", "IMPL")
library.fallback(run, "PrivateUse1")

PHONE = torch.device("phone")
CASES = [("reparameterize", {}, False), ("vae_loss", {"beta": 0.3, "kl_reduction": "sum"}, False)]
CASES += [("kl_normal", {"reduction": r}, prior) for r in REDUCTIONS for prior in (False, True)]
CASES += [
    ("sample_and_kl", {"reduction": r}, prior) for r in REDUCTIONS[:-1] for prior in (False, True)
]
CASES += [
    ("reconstruction_loss", {"reduction": r, "likelihood": likelihood}, False)
    for r in REDUCTIONS
    for likelihood in ("mse", "gaussian")
]
CASES += [("vae_loss", {"reduction": r, "beta": 0.3}, False) for r in REDUCTIONS[:-1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options", "prior"), CASES, ids=str)
def test_values_and_gradients(name, options, prior, dtype):
    tensors = inputs(name, (3, 7), dtype, PHONE, **({"prior": True} if prior else {}))
    got = check(name, tensors, **options)
    assert all(o.device.type == "phone" for o in got.outputs)


@pytest.mark.parametrize("name", ["reparameterize", "kl_normal", "sample_and_kl", "vae_loss"])
def test_latents_of_two_dtypes(name):
    """As on the CPU: each gradient has its tensor's own dtype and digits."""
    tensors = inputs(name, (3, 7))
    tensors["mu"] = tensors["mu"].bfloat16()
    want = evaluate(getattr(fastvae, name), tensors)
    got = evaluate(getattr(fastvae, name), {k: t.to(PHONE) for k, t in tensors.items()})
    for g, w in zip((*got[0], *got[1].values()), (*want[0], *want[1].values()), strict=True):
        torch.testing.assert_close(g.cpu(), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_beta_as_a_tensor(dtype):
    tensors = vae_inputs((3, 7), device=PHONE)
    beta = torch.tensor(0.3, dtype=dtype).to(PHONE)
    loss = fastvae.vae_loss(**tensors, beta=beta).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.cpu(), fastvae.vae_loss(**tensors, beta=0.3).loss.cpu())


def test_noise():
    """Standard normals, others in each draw, the same from the same seed."""
    tensors = latents((2000, 5))
    on_phone = latents((2000, 5), device=PHONE)

    def draw():
        yield fastvae.reparameterize(**on_phone)
        yield fastvae.sample_and_kl(**on_phone)[0]
        z, eps = fastvae.reparameterize(**on_phone, return_eps=True)
        torch.testing.assert_close(fastvae.reparameterize(**on_phone, eps=eps).cpu(), z.cpu())
        yield z

    first = [z.cpu() for z in draw()]
    torch.manual_seed(0)
    again = [z.cpu() for z in draw()]
    for z, same in zip(first, again, strict=True):
        torch.testing.assert_close(z, same, rtol=0, atol=0)
        eps = (z - tensors["mu"]) * torch.exp(-0.5 * tensors["logvar"])
        assert abs(eps.mean()) < 0.05
        assert abs(eps.std() - 1) < 0.05
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_a_generator():
    """phone has none of its own. What draws there is this op, which runs on the CPU as well."""
    tensors = latents((6, 5))
    op = torch.ops.fastvae.reparameterize_composed
    eps = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    z = op(**tensors, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(z, fastvae.reparameterize(**tensors, eps=eps))
    for draw in (fastvae.reparameterize, fastvae.sample_and_kl):
        with pytest.raises(RuntimeError, match=r"generator must be on mu's device phone"):
            draw(**latents((6, 5), device=PHONE), generator=torch.Generator())


@pytest.mark.parametrize("name", OUTPUTS)
def test_errors(name):
    """Those of the other devices."""
    tensors = inputs(name, (3, 5), device=PHONE)
    second = list(tensors)[1]
    wrong = tensors[second].to(torch.complex64)
    with pytest.raises(ValueError, match=rf"^fastvae.{name}: .*{second}.*\[3, 4\]"):
        getattr(fastvae, name)(**tensors | {second: noise((3, 4), device=PHONE)})
    with pytest.raises(TypeError, match=rf"^fastvae.{name}: {second} .*complex64"):
        getattr(fastvae, name)(**tensors | {second: wrong})
    with pytest.raises(RuntimeError, match=rf"^fastvae.{name}: .*{second}.*same device"):
        getattr(fastvae, name)(**tensors | {second: tensors[second].cpu()})
    with pytest.raises(RuntimeError, match=r"philox_normal: device.*phone"):
        fastvae.random.philox_normal(3, seed=1, device=PHONE)


def test_a_beta_that_wants_a_gradient_is_refused():
    beta = torch.tensor(0.3).to(PHONE).requires_grad_()
    with pytest.raises(ValueError, match=r"beta.*detach"):
        fastvae.vae_loss(**vae_inputs((3, 7), device=PHONE), beta=beta)
