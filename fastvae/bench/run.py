"""A run: which cases in which order, each checked, then timed beside its baselines in rounds that call all."""

from __future__ import annotations

import copy
import importlib
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastvae.bench import cases, check, models, timing
from fastvae.bench.cases import BOTH, FORWARD, Case
from fastvae.bench.models import Model
from fastvae.bench.timing import Device, Timed, Torch

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
    entries: list[Entry]
    if quick:
        few = [cases.objective("vae_loss", size) for size in cases.SIZES[1:3]]
        few.append(cases.latent("sample_and_kl", cases.MIDDLE))
        more: list[Any] = [cases.growing(1 << n) for n in (8, 14, 20)]
        more += [m for m in models.MODELS if m.name == "MLP, MNIST"]
        if set(ops) != set(OPS):  # asked for by name
            few, more = [], [*more, *(c for c in cases.all_cases() if c.elements <= 1 << 23)]
        plain = (replace(e, compiled=False) for e in more)
        entries = [*few, *plain]
    else:
        floats = (replace(c, cold=c.op != "noise") for c in cases.op_cases(cases.DTYPES[:1]))
        entries = [*models.MODELS, *floats, *cases.likelihood_cases(), *cases.term_cases()]
        top = 29 if device.gpu else 27
        growing = [cases.growing(1 << n) for n in (*range(8, top, 4), top)]
        entries += [*cases.pair_cases(), *growing, *cases.sigmoid_cases()]
        if (
            not device.gpu and torch.get_num_threads() > 1
        ):  # JAX's threads cannot be set while it runs
            single: Any = {"suite": "threads", "compiled": False, "jax": False, "threads": 1}
            entries += [replace(c, **single) for c in growing[:-1]]
        entries += [replace(c, passes=(BOTH,)) for c in cases.op_cases(cases.DTYPES[1:])]
        entries += [cases.growing_batch(1 << n) for n in (0, 4, 8, 12)]
    return [e for e in entries if e.op in ops]


def cost(entry: Entry, device: Device) -> tuple[float, int]:
    """About how many seconds an entry takes besides its timings, and how many timings it has."""
    if isinstance(entry, Model):
        return 10 + 2 * COMPILING[1 + (entry.elements < 1 << 17)] * entry.compiled, 5
    programs = len(device.modes) * (1 + (entry.suite == "compiled")) * entry.compiled
    timings = len(entry.passes) + 2 * entry.cold
    return 1 + COMPILING[0] * programs + PER_ELEMENT[
        device.type
    ] * entry.elements * timings, timings


class WrongResult(Exception):
    pass


class Run:
    """`rows` as the JSON has them, and what was `left_out` with the reason."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self.copies = device.copy_bandwidth()  # bytes a second, at the start
        self.copies_after: list[float] = []
        self.jax = self.attempt(
            "all", "jax", importlib.import_module, "fastvae.bench.jax_baselines"
        )
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
        self,
        entry: Entry,
        timed: Mapping[str, Timed],
        seconds: float,
        op: str,
        which: str,
        cold: bool = False,
        note: str = "",
    ) -> None:
        """A pass: one row for each implementation."""
        times = timing.interleave(self.device, timed, seconds, cold)
        ours = statistics.median(times["fastvae"]) if "fastvae" in times else None
        for name, values in times.items():
            p20, median, p80 = map(float, np.percentile(values, [20, 50, 80]))
            # Afterwards: by then all is compiled, and an optimizer has its state.
            memory = (None, None) if cold else self.device.memory_and_launches(timed[name])
            row = {"op": op, "shape": entry.shape, "dtype": entry.dtype_name}
            row |= {"device": self.device.type, "pass": which, "baseline": name}
            row |= {"median": median, "p20": p20, "p80": p80}
            row["bytes"] = entry.least_bytes(which) if isinstance(entry, Case) else None
            row["bandwidth_fraction"] = None  # when the bandwidth is known
            row["speedup"] = median / ours if ours else None
            row["peak_bytes"], row["launches"] = memory
            row["threads"] = None if self.device.gpu else torch.get_num_threads()
            row |= {"cache": "cold" if cold else "warm", "rounds": len(values)}
            row |= {"note": note if name.startswith("compile") else "", "suite": entry.suite}
            self.rows.append(row)

    def measure_case(self, case: Case, seconds: float) -> None:
        inputs = case.inputs(self.device.torch_device)
        upstream = case.upstream(inputs)
        found: dict[str, Any] = {}

        def add(name: str, make: Callable[..., Any], *arguments: Any) -> None:
            """With what `make` returns: a function of the inputs, or an implementation."""

            def checked() -> Any:
                made = make(*arguments)
                made = Torch(made, inputs, upstream) if callable(made) else made
                if problem := check.wrong(case, name, made):
                    raise WrongResult(problem)
                return made

            if (made := self.attempt(case, name, checked)) is not None:
                found[name] = made

        for name, function in case.functions.items():
            add(name, lambda function=function: function)
        ours = case.functions["fastvae"]
        if "fastvae" in found:
            found[AGAIN] = found["fastvae"]
            if self.device.gpu and case.elements <= LAUNCH_BOUND:
                add("fastvae-cuda-graph", torch.cuda.make_graphed_callables, ours, tuple(inputs))
        note, rivals = "", [name for name in found if not name.startswith("fastvae")]
        if case.compiled and rivals:
            which = FORWARD if case.passes == (FORWARD,) else BOTH
            timed = {name: found[name].timed(which) for name in rivals}
            times = timing.interleave(self.device, timed, SHORTEST)
            for rival in sorted(rivals, key=lambda name: statistics.median(times[name])):
                note = f"of {rival}"
                for name, mode in self.device.modes.items():
                    add(name, timing.compiled, case.functions[rival], mode)
                if "compile" in found:  # not all of them can be compiled
                    break
            if case.suite == "compiled":
                add("fastvae-compile", timing.compiled, ours)
        if self.jax and case.jax and case.elements <= JAX_LIMIT:
            add("jax", self.jax.Jax, case, inputs, upstream)
        for which, cold in [(p, False) for p in case.passes] + [(BOTH, True)] * case.cold:
            each = {n: self.attempt(case, n, made.timed, which) for n, made in found.items()}
            timed = {n: t for n, t in each.items() if t is not None}
            self.time(case, timed, seconds * (1 + cold), case.label, which, cold, note)

    def measure_step(self, entry: Model, seconds: float) -> None:
        """A model's training step with each objective, and by its side the objectives without the networks."""
        torch.manual_seed(0)
        model = entry.build(entry.widths[self.device.gpu is not None]).to(self.device.torch_device)
        x = entry.x(torch.randn(entry.batch, device=self.device.torch_device))

        def checked(kind: str, with_compiler: bool) -> models.Step:
            made = models.Step(copy.deepcopy(model), x, kind, with_compiler)
            if problem := made.wrong():
                raise WrongResult(problem)
            return made

        steps: dict[str, Timed] = {}
        alone: dict[str, Timed] = {}
        kinds = [
            ("fastvae", "fastvae", False),
            (AGAIN, "fastvae", False),
            ("eager", "eager", False),
        ]
        kinds += [("compile", "eager", True), ("fastvae-compile", "fastvae", True)] * entry.compiled
        for name, kind, with_compiler in kinds:
            step = self.attempt(entry, name, checked, kind, with_compiler)
            if step is not None:
                steps[name] = Timed(step)
            if step is not None and name == kind:
                alone[name] = Timed(step.alone())
        self.time(entry, steps, 4 * seconds, str(entry), "step")
        self.time(entry, alone, seconds, f"objective of: {entry.name}", BOTH)

    def measure(self, entry: Entry, seconds: float) -> None:
        torch._dynamo.reset()
        threads = torch.get_num_threads()
        torch.set_num_threads(entry.threads or threads)
        try:
            if isinstance(entry, Model):
                self.measure_step(entry, seconds)
            else:
                self.measure_case(entry, seconds)
        finally:
            torch.set_num_threads(threads)


def run(
    device: Device,
    entries: Sequence[Entry],
    row_seconds: float,
    seconds: float | None = None,
    on_progress: Callable[[str, float, float], None] = lambda name, done, total: None,
) -> Run:
    """Measure all `entries`, each pass for `row_seconds`; or what can be measured in `seconds`: rows get shorter first,
    then the entries go for which no time is left, which come last in a plan.

    `on_progress` gets the entry's name and the seconds done and to do, by estimate.
    """
    # AOTAutograd's cache knows an op by its name, and would time what it was in another version of fastvae.
    functorch: Any = importlib.import_module("torch._functorch.config")
    functorch.enable_autograd_cache = False
    deadline = time.perf_counter() + (seconds or math.inf)
    found = Run(device)
    costs = [cost(e, device) for e in entries]
    spent = estimated = 1.0
    for i, (entry, (fixed, timings)) in enumerate(zip(entries, costs, strict=True)):
        on_progress(str(entry), sum(f for f, _ in costs[:i]), sum(f for f, _ in costs))
        # How this machine compares with the estimates, and what is left.
        started, pace = time.perf_counter(), spent / estimated
        left = deadline - started
        if (
            16 * entry.elements > device.free_bytes()
        ):  # inputs, gradients, a plain one's temporaries
            found.leave_out(entry, "all", "needs more memory than is free")
            continue
        if pace * fixed > left:
            found.leave_out(entry, "all", "no time was left for it")
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
