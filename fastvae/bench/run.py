"""A run: which cases in which order, each checked, then timed beside its baselines in rounds that call all."""

from __future__ import annotations

import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fastvae.bench import cases, timing
from fastvae.bench.cases import Case
from fastvae.bench.models import MODELS, STEP, Model
from fastvae.bench.timing import BOTH, FORWARD, Device, Timed

Entry = Case | Model
OPS = [*dict.fromkeys(c.op for c in cases.all_cases()), "steps"]
AGAIN = "fastvae-again"  # the same code under another name: what of a ratio is noise
SECONDS = 0.5  # that a pass of a case is timed for, all its implementations together
SHORTEST = 0.05
LAUNCH_BOUND = 1 << 20  # elements, up to which a CUDA graph is worth a row
JAX_LIMIT = 1 << 28  # elements: its copy of the inputs passes through the host
# Seconds to compile a program of a case, of a model and of a tiny one, and for each element: corrected while running.
COMPILING = (3.5, 20.0, 8.0)
PER_ELEMENT = {"cpu": 2e-7, "cuda": 3e-9}


def plan(device: Device, quick: bool = False, ops: Sequence[str] = OPS) -> list[Entry]:
    """What to time in the order of its worth, as a run may have to stop early."""
    if quick and set(ops) == set(OPS):
        few = [cases.objective("vae_loss", size) for size in cases.SIZES[1:3]]
        more = [cases.growing(1 << n, compiled=False) for n in (8, 14, 20)]
        steps = [replace(m, compiled=False) for m in MODELS if m.name == "MLP, MNIST"]
        return [*few, cases.latent("sample_and_kl", cases.MIDDLE), *more, *steps]
    top = 29 if device.gpu else 27
    growing = [cases.growing(1 << n) for n in (*range(8, top, 4), top)]
    floats = (replace(c, cold=c.op != "noise") for c in cases.op_cases(cases.DTYPES[:1]))
    entries: list[Entry] = [*MODELS, *floats, *cases.likelihood_cases(), *cases.term_cases()]
    entries += [*cases.pair_cases(), *growing, *cases.sigmoid_cases()]
    if not device.gpu and torch.get_num_threads() > 1:
        # JAX's threads cannot be set while it runs.
        single: Any = {"suite": "threads", "compiled": False, "jax": False, "threads": 1}
        entries += [replace(c, **single) for c in growing[:-1]]
    entries += [replace(c, passes=(BOTH,)) for c in cases.op_cases(cases.DTYPES[1:])]
    entries += [cases.growing_batch(1 << n) for n in (0, 4, 8, 12)]
    if quick:  # some ops, asked for by name
        entries = [replace(e, compiled=False) for e in entries if e.elements <= 1 << 23]
    return [e for e in entries if e.op in ops]


def cost(entry: Entry, device: Device) -> tuple[float, int]:
    """About how many seconds an entry takes besides its timings, and how many timings it has: a step's are longer."""
    if isinstance(entry, Model):
        return 10 + 2 * COMPILING[1 + (entry.elements < 1 << 17)] * entry.compiled, 5
    programs = len(device.modes) * (1 + (entry.suite == "compiled")) * entry.compiled
    timings = len(entry.passes) + 2 * entry.cold
    elements = PER_ELEMENT[device.type] * entry.elements * timings
    return 1 + COMPILING[0] * programs + elements, timings


class WrongResult(Exception):
    pass


class Run:
    """`rows` as the JSON has them, and what was `left_out` with the reason."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.note = ""  # what was compiled of the entry
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self.copies = device.copy_bandwidth()  # bytes a second, at the start
        self.copies_after: list[float] = []
        jax = "fastvae.bench.jax_baselines"
        self.jax = self.attempt("all", "jax", importlib.import_module, jax)
        if self.jax and (reason := self.jax.why_not(device.torch_device)):
            self.leave_out("all", "jax", reason)
            self.jax = None

    def leave_out(self, what: object, baseline: str, reason: str, wrong: bool = False) -> None:
        found = {"what": str(what), "baseline": baseline, "reason": reason, "wrong": wrong}
        self.left_out.append(found)

    def attempt(self, what: object, name: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make` returns for `arguments`; None, and a note, where it raises: no baseline ends a run."""
        try:
            return make(*arguments)
        except WrongResult as error:
            self.leave_out(what, name, str(error), wrong=True)
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            ours = name in ("fastvae", "all") and "memory" not in reason.lower()
            self.leave_out(what, name, reason, wrong=ours and not isinstance(error, ImportError))
        return None

    def time(
        self, entry: Entry, timed: dict[str, Timed], seconds: float, which: str, cold: bool = False
    ) -> None:
        """A pass: one row for each implementation."""
        times = timing.interleave(self.device, timed, seconds, cold)
        ours = statistics.median(times["fastvae"]) if "fastvae" in times else None
        if isinstance(entry, Case):
            op, least = entry.label, entry.least_bytes(which)
        else:
            op, least = f"{STEP if which == STEP else 'objective of'}: {entry.name}", None
        for name, values in times.items():
            p20, median, p80 = map(float, np.percentile(values, [20, 50, 80]))
            # Afterwards: by then all is compiled, and an optimizer has its state.
            memory = (None, None) if cold else self.device.memory_and_launches(timed[name])
            row = {"op": op, "shape": entry.shape, "dtype": entry.dtype_name}
            row |= {"device": self.device.type, "pass": which, "baseline": name}
            row |= {"median": median, "p20": p20, "p80": p80, "bytes": least}
            row["bandwidth_fraction"] = None  # when the bandwidth is known
            row["speedup"] = median / ours if ours else None
            row["peak_bytes"], row["launches"] = memory
            row["threads"] = None if self.device.gpu else torch.get_num_threads()
            row |= {"cache": "cold" if cold else "warm", "rounds": len(values)}
            row |= {"note": self.note * name.startswith("compile"), "suite": entry.suite}
            self.rows.append(row)

    def implementations(self, entry: Entry) -> dict[str, Any]:
        """Those of an entry that give the right results, by name."""
        make, found = entry.start(self.device.torch_device), dict[str, Any]()

        def add(name: str, make: Callable[..., Any], *arguments: Any) -> None:
            def checked() -> Any:
                made = make(*arguments)
                if problem := entry.wrong(name, made):
                    raise WrongResult(problem)
                return made

            if (made := self.attempt(entry, name, checked)) is not None:
                found[name] = made

        for name in entry.functions:
            add(name, make, name)
        step, few = isinstance(entry, Model), entry.elements <= LAUNCH_BOUND
        if ours := found.get("fastvae"):
            found[AGAIN] = ours
            if self.device.gpu and few and not step:
                graph = partial(torch.cuda.make_graphed_callables, sample_args=tuple(ours.inputs))
                add("fastvae-cuda-graph", make, "fastvae", graph)
        rivals = [name for name in found if not name.startswith("fastvae")]
        self.note = ""
        if len(rivals) > 1 and entry.compiled:
            which = BOTH if BOTH in entry.passes else FORWARD
            timed = {name: found[name].timed(which) for name in rivals}
            times = timing.interleave(self.device, timed, SHORTEST)
            rivals.sort(key=lambda name: statistics.median(times[name]))
        if entry.compiled:
            for rival in rivals:
                self.note = f"of {rival}"
                for name, mode in ({"compile": None} if step else self.device.modes).items():
                    add(name, make, rival, partial(timing.compiled, mode=mode))
                if "compile" in found:  # not all of them can be compiled
                    break
            if entry.suite in ("compiled", "steps"):
                add("fastvae-compile", make, "fastvae", timing.compiled)
        if self.jax and found and not step and entry.jax and entry.elements <= JAX_LIMIT:
            beside = next(iter(found.values()))
            add("jax", self.jax.Jax, entry, beside.inputs, beside.upstream)
        return found

    def measure(self, entry: Entry, seconds: float) -> None:
        torch._dynamo.reset()
        threads = torch.get_num_threads()
        torch.set_num_threads(entry.threads or threads)
        try:
            found = self.implementations(entry)
            for which, cold in [(p, False) for p in entry.passes] + [(BOTH, True)] * entry.cold:
                whole = which == STEP or isinstance(entry, Case)
                part = found if whole else {n: found[n] for n in entry.functions if n in found}
                each = {n: self.attempt(entry, n, made.timed, which) for n, made in part.items()}
                timed = {n: t for n, t in each.items() if t is not None}
                longer = 4 if which == STEP else 1 + cold
                self.time(entry, timed, seconds * longer, which, cold)
        finally:
            torch.set_num_threads(threads)


def run(
    device: Device, entries: Sequence[Entry], row_seconds: float, seconds: float | None = None
) -> Run:
    """Measure all `entries`, each pass for `row_seconds`; or what can be measured in `seconds`: rows get shorter first,
    then the entries go for which no time is left, which come last in a plan."""
    # AOTAutograd's cache knows an op by its name, and would time what it was in another version of fastvae. Inductor's does not
    # know the vectors' width: a program that it kept from another CPU writes beyond its tensors.
    caches = {"_functorch": "enable_autograd_cache", "_inductor": "fx_graph_cache"}
    for module, option in caches.items():
        setattr(importlib.import_module(f"torch.{module}.config"), option, False)
    deadline = time.perf_counter() + (seconds or math.inf)
    found = Run(device)
    costs = [cost(e, device) for e in entries]
    spent = estimated = 1.0
    for i, (entry, (fixed, timings)) in enumerate(zip(entries, costs, strict=True)):
        print(f"{i + 1} of {len(entries)}: {entry}", file=sys.stderr)
        # How this machine compares with the estimates, and what is left.
        started, pace = time.perf_counter(), spent / estimated
        left = deadline - started
        reason = "no time was left for it" if pace * fixed > left else ""
        if 16 * entry.elements > device.free_bytes():  # with gradients and temporaries
            reason = "needs more memory than is free"
        if reason:
            found.leave_out(entry, "all", reason)
            continue
        length = (left - pace * sum(f for f, _ in costs[i:])) / sum(n for _, n in costs[i:])
        length = max(min(length, row_seconds), min(SHORTEST, row_seconds))
        # What was measured so far is not lost with an entry that fails.
        found.attempt(entry, "all", found.measure, entry, length)
        spent += time.perf_counter() - started
        estimated += fixed + timings * length
    found.copies_after = device.copy_bandwidth()
    bandwidth = statistics.median(found.copies + found.copies_after)
    for row in found.rows:
        if row["bytes"]:
            row["bandwidth_fraction"] = row["bytes"] / row["median"] / bandwidth
    return found
