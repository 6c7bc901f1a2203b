"""Wrong input: one clear ValueError, TypeError or RuntimeError that names the function and says what is wrong."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import OUTPUTS
from cases import inputs, seeded_generator

import fastvae
from fastvae import _ops, nn
from fastvae._ops import build_info
from fastvae.likelihoods import SquaredError
from fastvae.random import philox_normal

A_CLEAR_ERROR = (ValueError, TypeError, RuntimeError)
OPS = list(OUTPUTS)
SAMPLING = ["reparameterize", "sample_and_kl"]
WITH_PRIOR = ["kl_normal", "sample_and_kl"]


def good(name: str) -> dict[str, Any]:
    """Arguments that pass, to be spoiled one at a time."""
    tensors: dict[str, Any] = inputs(
        name, (3, 5), **({"prior": True} if name in WITH_PRIOR else {})
    )
    tensors.pop("eps", None)
    return tensors


def assert_refused(name: str, match: str, error=A_CLEAR_ERROR, **spoiled: Any) -> None:
    """`match` has to follow the function's name in the message."""
    arguments = good(name) | spoiled
    pattern = re.compile(rf"\b{name}\b.*{match}", re.DOTALL | re.IGNORECASE)
    with pytest.raises(error, match=pattern) as caught:
        getattr(fastvae, name)(**arguments)
    assert "INTERNAL ASSERT" not in str(caught.value)


@pytest.mark.parametrize("name", OPS)
def test_the_arguments_that_are_spoiled_below_are_good(name):
    getattr(fastvae, name)(**good(name))


EVERY_TENSOR = [(name, argument) for name in OPS for argument in good(name)]
NO_INTEGERS = [(name, argument) for name, argument in EVERY_TENSOR if argument != "x"]
INTEGERS = ("int64", "int16", "bool")
NOT_A_DENSE_FLOAT = {
    "None": lambda t: None,
    "list": lambda t: t.tolist(),
    "number": lambda t: 1.0,
    "array": lambda t: t.cpu().numpy(),
    "int64": lambda t: t.long(),
    "uint8": lambda t: t.abs().to(torch.uint8),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "mkldnn": lambda t: t.cpu().to_mkldnn(),
}
HALF_A_PRIOR = {
    ("kl_normal", "mu_p"),
    ("kl_normal", "logvar_p"),
    ("sample_and_kl", "mu_p"),
    ("sample_and_kl", "logvar_p"),
}


@pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*prototype stage")
@pytest.mark.parametrize("kind", NOT_A_DENSE_FLOAT)
@pytest.mark.parametrize(("name", "argument"), EVERY_TENSOR)
def test_what_is_not_a_dense_floating_point_tensor(name, argument, kind):
    """(A None for one half of a prior says that the other half is missing.)"""
    if argument == "x" and kind in INTEGERS:
        return  # which are read
    bad = NOT_A_DENSE_FLOAT[kind](good(name)[argument])
    both = kind == "None" and (name, argument) in HALF_A_PRIOR
    assert_refused(name, r"mu_p|logvar_p" if both else argument, **{argument: bad})


@pytest.mark.parametrize(("name", "argument"), NO_INTEGERS)
def test_the_dtype_is_named(name, argument):
    assert_refused(name, "(long|int64)", TypeError, **{argument: good(name)[argument].long()})


@pytest.mark.parametrize(("name", "argument"), EVERY_TENSOR)
def test_shapes_that_differ(name, argument):
    """Also those that would broadcast: a broadcast loss is a well-known silent mistake."""
    t = good(name)[argument]
    for bad in (t[:, :4], t[:2], t[:, :1], t[:1], t[0], t.unsqueeze(1), t.T, t[:0], t.flatten()):
        assert_refused(name, argument, ValueError, **{argument: bad})


@pytest.mark.parametrize("name", OPS)
def test_the_shapes_are_named(name):
    first, second = list(good(name))[:2]
    assert_refused(name, r"\[3, 4\]", ValueError, **{second: good(name)[second][:, :4]})
    assert_refused(name, r"\[3, 4\]", ValueError, **{first: good(name)[first][:, :4]})


@pytest.mark.parametrize("name", OPS)
def test_tensors_without_a_batch_dimension(name):
    scalars = {k: t[0, 0] for k, t in good(name).items()}
    assert_refused(name, "0-dim", ValueError, **scalars)


LATENTS = [(name, a) for name, a in EVERY_TENSOR if a in ("mu", "logvar", "mu_p", "logvar_p")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "argument"), LATENTS)
def test_float64_latents_go_with_float64_alone(name, argument, dtype):
    others = {k: t.to(dtype) for k, t in good(name).items()}
    assert_refused(name, "float64", TypeError, **others | {argument: good(name)[argument].double()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("argument", ["recon_x", "x"])
@pytest.mark.parametrize("name", ["reconstruction_loss", "vae_loss"])
def test_float64_images_go_with_float64_alone(name, argument, dtype):
    images = {k: good(name)[k].to(dtype) for k in ("recon_x", "x")}
    assert_refused(name, "float64", TypeError, **images | {argument: images[argument].double()})


@pytest.mark.parametrize(("name", "argument"), EVERY_TENSOR)
def test_meta_beside_cpu(name, argument):
    """The dispatcher would pick the Meta kernel and return a tensor without data."""
    assert_refused(name, "device", **{argument: good(name)[argument].to("meta")})


@pytest.mark.parametrize("name", SAMPLING)
def test_meta_eps_beside_cpu(name):
    assert_refused(name, "eps", eps=good(name)["mu"].to("meta"))


@pytest.mark.parametrize("name", OPS)
def test_on_meta_tensors_alone_an_op_gives_the_shapes(name):
    expected = getattr(fastvae, name)(**good(name))
    got = getattr(fastvae, name)(**{k: t.to("meta") for k, t in good(name).items()})
    for a, b in zip(
        *[(o,) if isinstance(o, torch.Tensor) else o for o in (got, expected)], strict=True
    ):
        assert a.is_meta
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


# Options


@pytest.mark.parametrize("bad", ["Sum", "avg", "", "batch_mean", None, 1, True])
@pytest.mark.parametrize("name", [n for n in OPS if n != "reparameterize"])
def test_reduction(name, bad):
    assert_refused(name, "reduction", (ValueError, TypeError), reduction=bad)
    if isinstance(bad, str):
        assert_refused(name, f"batchmean.*{bad}", ValueError, reduction=bad)


@pytest.mark.parametrize("name", ["vae_loss", "sample_and_kl"])
def test_an_elementwise_reduction_where_there_is_none(name):
    assert_refused(name, "none", ValueError, reduction="none")


@pytest.mark.parametrize("bad", ["Sum", "avg", "", "none", 1])
def test_kl_reduction(bad):
    assert_refused("vae_loss", "kl_reduction", (ValueError, TypeError), kl_reduction=bad)


@pytest.mark.parametrize("other", ["sum", "batchmean", "mean"])
def test_sample_goes_with_sample_only(other):
    assert_refused("vae_loss", "sample", ValueError, reduction="sample", kl_reduction=other)
    assert_refused("vae_loss", "sample", ValueError, reduction=other, kl_reduction="sample")


@pytest.mark.parametrize("bad", ["MSE", "l2", "", None, 1])
@pytest.mark.parametrize("name", ["reconstruction_loss", "vae_loss"])
def test_likelihood(name, bad):
    assert_refused(name, "likelihood", (ValueError, TypeError), likelihood=bad)
    if isinstance(bad, str):
        assert_refused(name, f"(mse|gaussian).*{bad}", ValueError, likelihood=bad)


@pytest.mark.parametrize("bad", [None, "1", [1.0], 1j, np.array([0.5])])
def test_beta_that_is_no_number(bad):
    assert_refused("vae_loss", "beta", TypeError, beta=bad)
    with pytest.raises(TypeError, match=r"VAELoss.*beta"):
        fastvae.nn.VAELoss(beta=bad)


def test_beta_as_a_tensor():
    assert_refused("vae_loss", "beta.*grad", beta=torch.tensor(1.0, requires_grad=True))
    assert_refused("vae_loss", "beta.*0-dim", beta=torch.ones(1))
    assert_refused("vae_loss", "beta", beta=torch.ones(3))
    assert_refused("vae_loss", "beta.*device", beta=torch.tensor(1.0, device="meta"))
    for dtype in (torch.float8_e4m3fn, torch.int64, torch.complex64):
        assert_refused("vae_loss", "beta.*float16", TypeError, beta=torch.ones((), dtype=dtype))
    for bad in (torch.tensor(1j), torch.tensor(1), torch.tensor(0.5).to(torch.float8_e4m3fn)):
        assert_refused("vae_loss", "beta.*dtype", TypeError, beta=bad)


def test_beta_that_wants_a_gradient_is_refused_without_grad_mode_too():
    with torch.no_grad():
        assert_refused("vae_loss", "beta.*grad", beta=torch.tensor(1.0, requires_grad=True))


@pytest.mark.parametrize("batch", [2, 4, 0])
def test_batches_that_differ(batch):
    latents = {k: torch.zeros(batch, 5) for k in ("mu", "logvar")}
    assert_refused("vae_loss", rf"batch.*{batch}", ValueError, **latents)


# Priors


@pytest.mark.parametrize("name", WITH_PRIOR)
@pytest.mark.parametrize("missing", ["mu_p", "logvar_p"])
def test_half_a_prior(name, missing):
    assert_refused(name, "both mu_p and logvar_p", ValueError, **{missing: None})


@pytest.mark.parametrize("name", WITH_PRIOR)
@pytest.mark.parametrize("argument", ["mu_p", "logvar_p"])
def test_a_prior_that_would_have_to_be_broadcast(name, argument):
    for bad in (torch.zeros(5), torch.zeros(1, 5), torch.zeros(()), torch.zeros(3, 1)):
        assert_refused(name, rf"{argument}.*expand_as", ValueError, **{argument: bad})


# Noise


@pytest.mark.parametrize("name", SAMPLING)
def test_eps(name):
    for shape in [(5,), (3, 4), (3, 1), (1, 5), (15,), ()]:
        assert_refused(name, "eps", ValueError, eps=torch.zeros(shape))
    for dtype in (torch.long, torch.float8_e4m3fn):
        assert_refused(name, "eps.*dtype", TypeError, eps=torch.zeros(3, 5).to(dtype))
    assert_refused(name, "eps", (TypeError, RuntimeError), eps=0.0)
    assert_refused(name, "eps", (TypeError, RuntimeError), eps=torch.zeros(3, 5).to_sparse())


@pytest.mark.parametrize("name", SAMPLING)
def test_generator(name):
    assert_refused(name, "generator", (TypeError, RuntimeError), generator=1)
    assert_refused(
        name, "eps and generator", ValueError, eps=torch.zeros(3, 5), generator=seeded_generator(1)
    )


def test_errors_of_a_reparameterize_that_returns_its_noise():
    """Another way through the code, and the same messages."""
    t = good("reparameterize")
    for argument in t:
        assert_refused(
            "reparameterize", argument, return_eps=True, **{argument: t[argument].long()}
        )
        assert_refused(
            "reparameterize", argument, return_eps=True, **{argument: t[argument][:, :4]}
        )
        assert_refused("reparameterize", argument, return_eps=True, **{argument: t[argument][0, 0]})
    assert_refused("reparameterize", "eps", return_eps=True, eps=torch.zeros(5))
    assert_refused("reparameterize", "generator", return_eps=True, generator=1)
    both = {"eps": torch.zeros(3, 5), "generator": seeded_generator(1)}
    assert_refused("reparameterize", "eps and generator", return_eps=True, **both)


def other_device() -> str:
    return "cpu" if torch.get_default_device().type == "cuda" else "cuda"


@pytest.mark.cuda
@pytest.mark.parametrize("name", SAMPLING)
def test_generator_of_another_device(name):
    assert_refused(name, "generator.*device", generator=torch.Generator(other_device()))


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "argument"), EVERY_TENSOR)
def test_cuda_beside_cpu(name, argument):
    assert_refused(name, "device", **{argument: good(name)[argument].to(other_device())})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", OPS)
def test_cuda_tensors_given_to_a_build_without_cuda(name):
    if not build_info()["cuda"].startswith("not built"):
        pytest.skip("fastvae was built with CUDA")
    assert_refused(name, "built without CUDA", **{k: t.cuda() for k, t in good(name).items()})


# The compiled library


def test_a_library_of_another_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    built_for = re.escape(build_info()["torch"])
    message = (
        rf"built for torch {built_for}, but torch 2\.9\.1\+cu128 is .*\+torch2\.9 .*pip install"
    )
    with pytest.raises(ImportError, match=message):
        _ops._load()


@pytest.mark.parametrize(
    ("content", "match"),
    [(None, "No such file"), (b"", "empty"), (b'"torch": "%s"', "file too short|invalid ELF")],
)
def test_a_library_that_does_not_load(content, match, tmp_path, monkeypatch):
    library = tmp_path / "_C.abi3.so"
    if content is not None:
        library.write_bytes(content.replace(b"%s", torch.__version__.encode()))
    monkeypatch.setattr(_ops, "LIBRARY", library)
    with pytest.raises(ImportError, match=rf"does not load beside torch .*({match}).*pip install"):
        _ops._load()


def test_positional_arguments_end_where_the_signature_says():
    mu, logvar = good("reparameterize").values()
    with pytest.raises(TypeError, match="reparameterize"):
        fastvae.reparameterize(mu, logvar, torch.zeros(3, 5))
    with pytest.raises(TypeError, match="kl_normal"):
        fastvae.kl_normal(mu, logvar, mu, logvar, "sum")
    with pytest.raises(TypeError, match="vae_loss"):
        fastvae.vae_loss(mu, mu, mu, logvar, 1.0)


# philox_normal


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"start": -1}, "start"),
        ({"start": 1.5}, "start"),
        ({"offset": 1.5}, "offset"),
        ({"seed": 1.5}, "seed"),
        ({"seed": None}, "seed"),
        ({"dtype": torch.int64}, "dtype"),
        ({"dtype": torch.complex64}, "dtype"),
        ({"size": (-1,)}, r"(size|shape|negative)"),
        ({"size": (2.5,)}, r"(size|shape)"),
    ],
    ids=str,
)
def test_philox_normal(arguments, match):
    kwargs = {"seed": 1} | arguments
    size = kwargs.pop("size", (3,))
    with pytest.raises(A_CLEAR_ERROR, match=rf"(?s)philox_normal.*{match}"):
        philox_normal(*size, **kwargs)


def test_philox_normal_without_a_seed():
    with pytest.raises(TypeError, match="seed"):
        philox_normal(3)


# Modules


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"likelihood": "l2"}, "likelihood"),
        ({"reduction": "avg"}, "reduction"),
        ({"kl_reduction": "avg"}, "reduction"),
        ({"reduction": "sample", "kl_reduction": "sum"}, "sample"),
        ({"beta": "1"}, "beta"),
    ],
    ids=str,
)
def test_vae_loss_module(options, match):
    """At the latest when it is called."""
    with pytest.raises((ValueError, TypeError), match=match):
        nn.VAELoss(**options)(**good("vae_loss"))


@pytest.mark.parametrize("bad", ["train", "", None, True])
def test_reparameterize_module(bad):
    with pytest.raises((ValueError, TypeError), match=r"eval_mode.*mean"):
        nn.Reparameterize(eval_mode=bad)


def test_nan_is_not_an_error():
    assert math.isnan(fastvae.vae_loss(**good("vae_loss"), beta=math.nan).loss.item())


# What a message says to do, done


def follow(name: str, **arguments: Any) -> Any:
    """The op's result, after doing to the letter what its messages say."""
    for _ in range(len(arguments) + 1):
        try:
            return getattr(fastvae, name)(**arguments)
        except A_CLEAR_ERROR as error:
            message = str(error)
        subject = re.match(rf"fastvae\.{name}: (\w+)", message)
        assert subject, message
        advice = re.search(
            r"(?:with|give|as|call) (\w*)(\.[\w.]+(?:\([\w.]*\))?(?: / 255)?)", message
        )
        assert advice, message
        argument = advice[1] or subject[1]
        arguments[argument] = eval(argument + advice[2], {}, arguments)
    raise AssertionError(message)


def assert_following_gives(want: Any, op: str, **arguments: Any) -> None:
    torch.testing.assert_close(follow(op, **arguments), want)


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.round() + (t.round() == 0)  # no 0, which a sparse tensor would leave out


# A tensor that is refused, and a dense floating-point one with the same numbers.
CONVERTED = {
    "pixels": lambda t: ((t.abs() * 40).to(torch.uint8), (t.abs() * 40).floor() / 255),
    "uint8": lambda t: (whole(t.abs()).to(torch.uint8), whole(t.abs())),
    "int64": lambda t: (whole(t).long(), whole(t)),
    "int16": lambda t: (whole(t).to(torch.int16), whole(t)),
    "bool": lambda t: (t > 0, (t > 0).float()),
    "float8": lambda t: (whole(t).to(torch.float8_e4m3fn), whole(t)),
    "complex": lambda t: (torch.complex(t, -t), t),
    "negative": lambda t: (torch.complex(t, -t).conj().imag, t),
    "sparse": lambda t: (t.to_sparse(), t),
    "csr": lambda t: (t.to_sparse_csr(), t),
    "mkldnn": lambda t: (t.to_mkldnn(), t),
    "nested": lambda t: (torch.nested.nested_tensor(list(t)), t),
    "jagged": lambda t: (torch.nested.nested_tensor(list(t), layout=torch.jagged), t),
    "quantized": lambda t: (torch.quantize_per_tensor(whole(t), 1.0, 0, torch.qint8), whole(t)),
}


@pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*prototype stage", "ignore:.*quant")
@pytest.mark.parametrize("kind", CONVERTED)
@pytest.mark.parametrize(("name", "argument"), EVERY_TENSOR)
def test_following_how_to_convert(name, argument, kind):
    arguments = good(name)
    if name in SAMPLING:
        arguments["eps"] = torch.ones(3, 5)
    if (kind == "pixels") != (argument == "recon_x") and kind in ("pixels", "uint8"):
        pytest.skip("an image is pixels; latents and numbers meant as they are, are not")
    refused, accepted = CONVERTED[kind](arguments[argument])
    want = getattr(fastvae, name)(**arguments | {argument: accepted})
    assert_following_gives(want, name, **arguments | {argument: refused})


def test_pixels_need_a_scale():
    """0..255 taken as they are make a training diverge."""
    image = (torch.rand(3, 5) * 255).to(torch.uint8)
    recon_x = torch.full((3, 5), 0.5)
    with pytest.raises(ValueError, match=r"reconstruction_loss: x is uint8: .*x_scale=1 / 255"):
        fastvae.reconstruction_loss(recon_x, image)
    torch.testing.assert_close(
        fastvae.reconstruction_loss(recon_x, image, likelihood=SquaredError(x_scale=1 / 255)),
        fastvae.reconstruction_loss(recon_x, image.float() / 255),
    )


NOT_FIRST = [(name, a) for name, a in EVERY_TENSOR if a not in ("mu", "recon_x")]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize(("name", "argument"), [*NOT_FIRST, *((name, "eps") for name in SAMPLING)])
def test_following_how_to_give_what_is_shared(name, argument, shape):
    arguments = good(name)
    if name in SAMPLING:
        arguments["eps"] = torch.ones(3, 5)
    shared = torch.linspace(-0.7, 0.4, math.prod(shape)).reshape(shape)
    want = getattr(fastvae, name)(**arguments | {argument: torch.zeros(3, 5) + shared})
    assert_following_gives(want, name, **arguments | {argument: shared})


@pytest.mark.parametrize("name", OPS)
def test_following_how_to_give_numbers(name):
    """A batch of one."""
    scalars = {k: t[0, 0] for k, t in good(name).items()}
    if name in SAMPLING:
        scalars["eps"] = torch.tensor(0.7)
    want = getattr(fastvae, name)(**{k: t.reshape(1) for k, t in scalars.items()})
    assert_following_gives(want, name, **scalars)


@pytest.mark.parametrize("argument", list(good("vae_loss")))
def test_no_advice_where_a_shape_cannot_be_expanded(argument):
    for bad in ((3, 4), (2, 5), (3, 1, 5), (7,)):
        with pytest.raises(ValueError) as caught:
            fastvae.vae_loss(**good("vae_loss") | {argument: torch.zeros(bad)})
        assert "expand_as" not in str(caught.value)


def test_following_the_other_messages():
    t = good("vae_loss")
    want = fastvae.vae_loss(**t, beta=2.0)
    assert_following_gives(want, "vae_loss", **t, beta=torch.tensor(2))
    assert_following_gives(want, "vae_loss", **t, beta=torch.tensor(2.0 + 1j))
    beta = torch.tensor(2.0, requires_grad=True)
    assert_following_gives(want, "vae_loss", **t, beta=beta)
    with pytest.raises(ValueError, match=r"to learn it, .*: recon \+ beta \* kl$"):
        fastvae.vae_loss(**t, beta=beta)
    terms = fastvae.vae_loss(**t)
    loss = terms.recon + beta * terms.kl
    torch.testing.assert_close(loss.detach(), want.loss)
    loss.backward()
    torch.testing.assert_close(beta.grad, want.kl)

    images = good("reconstruction_loss")
    for other in (torch.Tensor.double, torch.Tensor.float):  # "convert one of them"
        with pytest.raises(TypeError, match="convert one of them"):
            fastvae.reconstruction_loss(images["recon_x"].double(), images["x"])
        both = {k: other(x) for k, x in images.items()}
        torch.testing.assert_close(
            fastvae.reconstruction_loss(**both).float(), fastvae.reconstruction_loss(**images)
        )

    latents = good("kl_normal")
    posterior = {k: latents[k] for k in ("mu", "logvar")}
    zeros = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"give both, or neither for N\(0, 1\)"):
        fastvae.kl_normal(**posterior, mu_p=zeros)
    torch.testing.assert_close(
        fastvae.kl_normal(**posterior, mu_p=zeros, logvar_p=zeros), fastvae.kl_normal(**posterior)
    )


def test_following_the_message_about_many_dimensions():
    t = torch.rand(18).as_strided((2,) * 17, (1,) * 17)
    with pytest.raises(ValueError, match=r"call \.contiguous\(\) on it first"):
        fastvae.reconstruction_loss(t, torch.zeros_like(t))
    got = fastvae.reconstruction_loss(t.contiguous(), torch.zeros_like(t))
    torch.testing.assert_close(got, t.square().sum() / 2)


# torch.jit.script


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sample = nn.Reparameterize()
        self.loss = nn.VAELoss(0.3)

    def forward(self, x: torch.Tensor, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        recon_x = torch.sigmoid(self.sample(mu, logvar))
        return self.loss(recon_x, x, mu, logvar)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_in_one_line():
    public = [getattr(fastvae, name) for name in fastvae.__all__]
    functions = [f for f in public if callable(f) and not isinstance(f, type)]
    assert len(functions) > 12
    for f in (*functions, nn.VAELoss(), Model()):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot") as caught:
            torch.jit.script(f)
        assert str(caught.value).startswith("fastvae.")
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_following_the_message_about_torchscript():
    args = (torch.rand(3, 5), torch.randn(3, 5), torch.randn(3, 5))
    model = Model()

    def run(f: Any) -> torch.Tensor:
        torch.manual_seed(1)
        return f(*args)

    want = run(model)
    for f in (
        torch.jit.trace(model, args, check_trace=False),
        torch.export.export(model, args).module(),
        torch.compile(model, backend="eager", fullgraph=True),
    ):
        torch.testing.assert_close(run(f), want)
