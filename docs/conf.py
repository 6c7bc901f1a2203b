"""Sphinx: `make docs`. The pages of the API are written from ``__all__`` here, so that none of its names can be missing."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from docutils import nodes  # noqa: E402
from docutils.utils.math.latex2mathml import tex2mathml  # noqa: E402
from formulas import FORMULAS  # noqa: E402
from sphinx import addnodes  # noqa: E402
from sphinx.util import logging  # noqa: E402

import fastvae  # noqa: E402

project = "fastvae"
author = "the fastvae authors"
version = release = fastvae.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["pictures"]
html_theme = "furo"
html_title = f"fastvae {version}"
html_static_path = ["_static"]
html_css_files = ["fastvae.css"]
html_copy_source = html_show_sourcelink = html_show_copyright = html_show_sphinx = False
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "friendly", "github-dark"
default_role = "py:obj"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 90
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

# The API ---------------------------------------------------------------------------------------------

# What a module's page is called. One that is not here is called by its name.
TITLES = {
    "functional": "Objective",
    "likelihoods": "Likelihoods",
    "densities": "Densities",
    "divergences": "Divergences",
    "pairwise": "Mixtures and total correlation",
    "multivariate": "Full covariance",
    "importance": "Importance weights",
    "posterior": "Posterior objects",
    "distributions": "torch.distributions",
    "nn": "Modules",
    "schedules": "Schedules",
    "diagnostics": "Diagnostics",
    "recipes": "Recipes",
    "random": "Noise",
    "reference": "Reference",
}


def public_names() -> dict[str, list[str]]:
    """The full names of what each module makes public, under the name that users write.

    A name of ``fastvae.__all__`` is ``fastvae.name``, on the page of the module that defines it.
    """
    names: dict[str, list[str]] = {}
    for name in fastvae.__all__:
        value = getattr(fastvae, name)
        if not inspect.ismodule(value) and name != "__version__":
            page = _page_of(value.__module__)
            names.setdefault("functional" if page == "reference" else page, []).append(
                f"fastvae.{name}"
            )
    for found in pkgutil.iter_modules(fastvae.__path__):
        if found.ispkg or found.name.startswith("_"):
            continue
        module = importlib.import_module(f"fastvae.{found.name}")
        is_public = found.name in fastvae.__all__
        for name in getattr(module, "__all__", []) if is_public else []:
            if getattr(fastvae, name, None) is not getattr(module, name):
                names.setdefault(found.name, []).append(f"fastvae.{found.name}.{name}")
    order = [*TITLES, *sorted(set(names) - set(TITLES))]
    return {name: sorted(names[name], key=str.lower) for name in order if name in names}


def _page_of(module: str) -> str:
    return module.removeprefix("fastvae.").split(".")[0]


def api_pages() -> dict[str, str]:
    """The text of each page of the API, by its path."""
    pages, table = {}, []
    for page, names in public_names().items():
        title = TITLES.get(page, page)
        module = importlib.import_module(f"fastvae.{page}")
        lines = [title, "=" * len(title), ""]
        if page in fastvae.__all__:
            lines += [f".. py:module:: fastvae.{page}", ""]
        lines += [*_docstring(module), ""]
        table += [
            "",
            title,
            "-" * len(title),
            "",
            ".. list-table::",
            "   :widths: 40 60",
            "   :width: 100%",
            "",
        ]
        for name in names:
            value = _value(name)
            kind = "autoclass" if inspect.isclass(value) else "autofunction"
            lines += [f".. {kind}:: {name}"]
            if kind == "autoclass":
                lines += ["   :members:"]
            lines += [""]
            short = name.removeprefix("fastvae.")
            table += [f"   * - :py:obj:`{short} <{name}>`", f"     - {_first_sentence(value)}"]
        pages[f"api/{page}.rst"] = "\n".join(lines) + "\n"
    index = ["API", "===", "", "Every public name. A page begins with what its names share.", ""]
    index += ["``fastvae.__version__`` is the version.", ""]
    index += [".. toctree::", "   :maxdepth: 1", "   :hidden:", ""]
    index += [f"   {page}" for page in public_names()]
    pages["api/index.rst"] = "\n".join([*index, *table]) + "\n"
    return pages


def _value(name: str) -> Any:
    value: Any = fastvae
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


def _first_sentence(value: Any) -> str:
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return _escape(re.split(r"(?<=[^.]{3}\.)\s", text)[0].rstrip(":"))


def _docstring(value: Any) -> list[str]:
    return [_escape(line) for line in (inspect.getdoc(value) or "").splitlines()]


def _escape(line: str) -> str:
    """In reStructuredText |x| is a substitution; in these docstrings it is an absolute value."""
    return re.sub(r"(``.*?``)|\|", lambda m: m[1] or r"\|", line)


def _on_docstring(_app: Any, what: str, name: str, _value: Any, _options: Any, lines: Any) -> None:
    lines[:] = [_escape(line) for line in lines]
    if formula := FORMULAS.get(name):
        where = lines.index("") if "" in lines else len(lines)
        lines[where:where] = ["", ".. math::", "", f"   {formula}", ""]


def _on_skip_member(_app: Any, _what: str, name: str, value: Any, skip: Any, _options: Any) -> Any:
    """What a likelihood tells the kernels, and what a namedtuple says of its fields, is for nobody to read."""
    of_kernels = isinstance(getattr(fastvae.likelihoods.Likelihood, name, None), property)
    of_kernels |= name in ("formula", "constant", "opaque")
    return True if of_kernels or "Alias for field" in (inspect.getdoc(value) or "") else skip


def _on_missing_reference(_app: Any, _env: Any, node: Any, content: Any) -> Any:
    """Names of other libraries are left as they are; one of ours that does not exist is an error."""
    target = node.get("reftarget", "")
    first = target.split(".")[0]
    if node.get("refdomain") != "py":
        return None
    if first == "fastvae" or ("." in target and first in fastvae.__all__):
        logging.getLogger(__name__).warning("there is no %s", target, location=node)
    return content


def _on_doctree_read(app: Any, doctree: nodes.document) -> None:
    """In our pages `kl_normal` in backticks, alone, is a link to it."""
    if app.env.docname.startswith("api/"):
        return
    modules = [n for n in fastvae.__all__ if inspect.ismodule(getattr(fastvae, n))]
    known = {f"fastvae.{name}": f"fastvae.{name}" for name in modules}
    for name in (name for names in public_names().values() for name in names):
        for short in (name, name.removeprefix("fastvae."), name.rpartition(".")[2]):
            known.setdefault(short, name)
    for literal in list(doctree.findall(nodes.literal)):
        target = known.get(literal.astext().split("(")[0])
        if target and not isinstance(literal.parent, nodes.reference):
            link = addnodes.pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refexplicit=True
            )
            literal.replace_self(link)
            link += literal


# Pages from elsewhere in the repository --------------------------------------------------------------

# Their links, and links to them, become links to these pages.
ELSEWHERE = {"benchmarks/README.md": "method.md", "CHANGELOG.md": "changelog.md"}
ELSEWHERE |= {
    str(path.relative_to(ROOT)): f"results/{path.parent.name}.md"
    for path in sorted(ROOT.glob("benchmarks/results/*/README.md"))
}


def _relinked(text: str, origin: Path, place: Path) -> str:
    """`text` of the file `origin`, for the page `place`."""

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        path = (origin.parent / target).resolve()
        if target.startswith(("http", "#")) or not path.exists():
            return match[0]
        if path.is_dir():
            return label.strip("[]")
        page = ELSEWHERE.get(str(path.relative_to(ROOT)))
        path = HERE / page if page else path
        return f"{label}({os.path.relpath(path, place.parent)}{anchor})"

    return re.sub(r"(!?\[[^\]]*\])\(([^)#\s]+)(#[^)]*)?\)", link, text)


def _on_source_read(_app: Any, name: str, source: list[str]) -> None:
    path = HERE / f"{name}.md"
    if path.exists() and path.relative_to(HERE).as_posix() not in ELSEWHERE.values():
        source[0] = _relinked(source[0], path, path)
    # A table of times does not break 2.43 x in two.
    source[0] = re.sub(r"(?<=\d) (?=(?:x|us|ms|s|B|kB|MB|GB) \|)", "\u00a0", source[0])


def elsewhere_pages() -> dict[str, str]:
    return {
        page: _relinked((ROOT / origin).read_text(), ROOT / origin, HERE / page)
        for origin, page in ELSEWHERE.items()
    }


def write_pages(_app: Any = None) -> None:
    pages = api_pages() | elsewhere_pages()
    for old in [*HERE.glob("api/*.rst"), *HERE.glob("results/*.md")]:
        if str(old.relative_to(HERE)) not in pages:
            old.unlink()
    for path, text in pages.items():
        place = HERE / path
        place.parent.mkdir(exist_ok=True)
        if not place.exists() or place.read_text() != text:  # an unchanged page is not built again
            place.write_text(text)


# Formulas: MathML, which browsers show by themselves ---------------------------------------------------


def _mathml(tex: str, block: bool = False) -> str:
    tex = rf"\begin{{aligned}}{tex}\end{{aligned}}" if block and r"\\" in tex else tex
    tex = re.sub(r"\\log(?![a-z(])", r"\\log\\,", tex)  # log x, not logx
    return str(tex2mathml(tex, as_block=block))


def _inline_math(translator: Any, node: Any) -> None:
    translator.body.append(_mathml(node.astext()))
    raise nodes.SkipNode


def _math_block(translator: Any, node: Any) -> None:
    translator.body.append(f'<div class="math">{_mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (_inline_math, None), (_math_block, None))
    app.connect("builder-inited", write_pages)
    app.connect("doctree-read", _on_doctree_read)
    app.connect("source-read", _on_source_read)
    app.connect("autodoc-process-docstring", _on_docstring)
    app.connect("autodoc-skip-member", _on_skip_member)
    app.connect("missing-reference", _on_missing_reference)
