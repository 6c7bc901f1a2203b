"""A run: which cases in which order, each checked, then timed beside its baselines in rounds that call all."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from fastvae.bench import cases
from fastvae.bench.cases import BOTH, Case, Timed
from fastvae.bench.models import MODELS, Model

# Or Kineto writes a line to stderr whenever a profile starts or stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Entry = Case | Model
OPS = [*dict.fromkeys(c.op for c in cases.all_cases()), "steps"]
AGAIN = "fastvae-again"  # the same code under another name: what of a ratio is noise
SECONDS = 1.0  # that a pass of a case is timed for, all its implementations together
SHORTEST = 0.05
COPIES = 21
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
WARM_UP, LEAST_ROUNDS, MOST_ROUNDS = 2, 7, 3000
LAUNCH_BOUND = 1 << 20  # elements, up to which a CUDA graph is worth a row


class Device:
    """The CPU with the host's clock, or a GPU with CUDA events on an idle device: what the host takes to launch is in the time.

    Raises:
        RuntimeError, AssertionError: torch has no such device.
    """

    def __init__(self, name: str) -> None:
        self.torch_device = torch.device(name)
        self.type = self.torch_device.type
        if self.type not in COPY_BYTES:
            raise RuntimeError(f"there are benchmarks for {' and '.join(COPY_BYTES)} only")
        torch.zeros(1, device=self.torch_device)
        self.gpu: str | None = None
        if self.type == "cuda":
            torch.cuda.set_device(self.torch_device)
            self.gpu = torch.cuda.get_device_name()
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time(self, timed: Timed) -> float:
        """Seconds of one call."""
        state = timed.setup()
        if self.gpu:
            torch.cuda.synchronize()
        if self.gpu and not timed.foreign:
            self.events[0].record()
            result = timed.call(state)
            self.events[1].record()
            self.events[1].synchronize()
            seconds = float(self.events[0].elapsed_time(self.events[1])) / 1e3
        else:  # another library's call waits for its result
            started = time.perf_counter()
            result = timed.call(state)
            seconds = time.perf_counter() - started
        del result, state  # freeing is not timed
        return seconds

    def peak_bytes(self, timed: Timed) -> int | None:
        """What one call holds at most beyond what it was given; None for another library's."""
        if timed.foreign:
            return None
        state = timed.setup()
        if self.gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            timed.call(state)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            timed.call(state)
        with tempfile.TemporaryDirectory() as folder:  # the one format that is documented
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        memory = [e for e in events if e.get("name") == "[memory]"]
        memory.sort(key=lambda e: float(e["ts"]))
        return max(itertools.accumulate((int(e["args"]["Bytes"]) for e in memory), initial=0))

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of `copy_` between two buffers that no cache holds: the median of copies."""
        source = torch.ones(COPY_BYTES[self.type] // 4, device=self.torch_device)
        target = torch.empty_like(source)
        copy = Timed(lambda _: target.copy_(source))
        times = [self.time(copy) for _ in range(COPIES + 3)][3:]
        return 2 * source.nbytes / statistics.median(times)


def interleave(
    device: Device, timed: Mapping[str, Timed], seconds: float
) -> dict[str, list[float]]:
    """Seconds of each call, from rounds that call all in turn, in an order drawn for each round: whatever else the
    machine does meets all of them, and none always runs after the same other, on the caches and threads that one left.

    The first rounds are not counted: they compile, fault pages in and settle the allocator.
    """
    order, drawn, deadline = list(timed), random.Random(0), math.inf
    times: dict[str, list[float]] = {name: [] for name in order}
    for i in range(-WARM_UP, MOST_ROUNDS):
        if i == 0:
            deadline = time.perf_counter() + seconds
        if i >= LEAST_ROUNDS and time.perf_counter() > deadline:
            break
        drawn.shuffle(order)
        for name in order:
            times[name].append(device.time(timed[name]))
    return {name: values[WARM_UP:] for name, values in times.items()}


def plan(device: Device, quick: bool = False, ops: Sequence[str] = OPS) -> list[Entry]:
    """What to time in the order of its worth, as a run may have to stop early."""
    if quick and set(ops) == set(OPS):
        few = [cases.objective("vae_loss", size) for size in cases.SIZES[1:3]]
        more = [replace(cases.growing(1 << n), compiled=False) for n in (8, 14, 20)]
        steps = [replace(m, compiled=False) for m in MODELS if "MNIST" in m.name]
        return [*few, cases.latent("sample_and_kl", cases.MIDDLE), *more, *steps]
    entries: list[Entry] = [*MODELS, *cases.op_cases(cases.DTYPES[:1]), *cases.likelihood_cases()]
    entries += [*cases.term_cases(), *cases.pair_cases()]
    entries += [cases.growing(1 << n) for n in range(8, 29 if device.gpu else 25, 4)]
    entries += cases.sigmoid_cases()
    entries += [replace(c, passes=(BOTH,)) for c in cases.op_cases(cases.DTYPES[1:])]
    if quick:  # some ops, asked for by name
        entries = [replace(e, compiled=False) for e in entries if e.elements <= 1 << 23]
    return [e for e in entries if e.op in ops]


def fixed_cost(entry: Entry) -> float:
    """About how many seconds an entry takes besides its timings, for the most part to compile."""
    return 1 + {"steps": 40, "compiled": 8}.get(entry.suite, 4) * entry.compiled


class WrongResult(Exception):
    pass


class Run:
    """`rows` as the JSON has them, and what was `left_out` with the reason."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self.copy_bandwidth = device.copy_bandwidth()
        jax = "fastvae.bench.jax_baselines"
        self.jax = self.attempt("all", "jax", importlib.import_module, jax)

    def leave_out(self, what: object, baseline: str, reason: str, wrong: bool = False) -> None:
        found = {"what": str(what), "baseline": baseline, "reason": reason, "wrong": wrong}
        self.left_out.append(found)

    def attempt(self, what: object, name: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make` returns for `arguments`; None, and a note, where it raises: no baseline ends a run."""
        try:
            return make(*arguments)
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            excused = isinstance(error, ImportError) or "memory" in reason.lower()
            ours = name in ("fastvae", "all") and not excused
            self.leave_out(what, name, reason, wrong=ours or isinstance(error, WrongResult))
        return None

    def implementations(self, entry: Entry) -> tuple[dict[str, Any], str]:
        """Those of an entry that give the right results, by name; which of them "compile" compiles."""
        make, found, compiled = entry.start(self.device.torch_device), dict[str, Any](), ""

        def add(name: str, make: Callable[..., Any], *arguments: Any) -> None:
            def checked() -> Any:
                made = make(*arguments)
                if problem := entry.wrong(made):
                    raise WrongResult(problem)
                return made

            if (made := self.attempt(entry, name, checked)) is not None:
                found[name] = made

        for name in entry.functions:
            add(name, make, name)
        rivals = {n: made.timed(entry.passes[-1]) for n, made in found.items() if n != "fastvae"}
        if ours := found.get("fastvae"):
            found[AGAIN] = ours
            if self.device.gpu and isinstance(entry, Case) and entry.elements <= LAUNCH_BOUND:
                graph = partial(torch.cuda.make_graphed_callables, sample_args=tuple(ours.inputs))
                add("fastvae-cuda-graph", make, "fastvae", graph)
        if entry.compiled:
            times = interleave(self.device, rivals, SHORTEST)
            for rival in sorted(rivals, key=lambda name: statistics.median(times[name])):
                if "compile" not in found:  # not all can be compiled
                    compiled = rival
                    add("compile", make, rival, cases.compiled)
            if self.device.gpu and "compile" in found and isinstance(entry, Case):
                graphs = partial(cases.compiled, mode="reduce-overhead")
                add("compile-reduce-overhead", make, compiled, graphs)
            if entry.suite in ("compiled", "steps"):
                add("fastvae-compile", make, "fastvae", cases.compiled)
        if self.jax and found and entry.name.removesuffix(": eps given") in self.jax.FUNCTIONS:
            beside = next(iter(found.values()))
            add("jax", self.jax.Jax, entry, beside.inputs, beside.upstream)
        return found, compiled

    def measure(self, entry: Entry, seconds: float) -> None:
        """One row for each pass and implementation."""
        torch._dynamo.reset()
        found, compiled = self.implementations(entry)
        for which in entry.passes:
            alone, least = isinstance(entry, Model) and which == BOTH, entry.least_bytes(which)
            op = entry.name.replace("step", "objective of") if alone else entry.name
            each = {n: self.attempt(entry, n, made.timed, which) for n, made in found.items()}
            timed = {n: t for n, t in each.items() if t is not None}
            times = interleave(self.device, timed, seconds)
            ours = statistics.median(times["fastvae"]) if "fastvae" in times else None
            for name, values in times.items():
                p20, median, p80 = map(float, np.percentile(values, [20, 50, 80]))
                row = {"op": op, "shape": entry.shape, "dtype": entry.dtype_name}
                row |= {"device": self.device.type, "pass": which, "baseline": name}
                row |= {"median": median, "p20": p20, "p80": p80, "bytes": least}
                row["bandwidth_fraction"] = least and least / median / self.copy_bandwidth
                row["speedup"] = median / ours if ours else None
                # Afterwards: by then all is compiled, and an optimizer has its state.
                row["peak_bytes"] = self.device.peak_bytes(timed[name])
                row |= {
                    "rounds": len(values),
                    "note": f"of {compiled}" * name.startswith("compile"),
                }
                self.rows.append(row | {"suite": entry.suite})


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
    deadline = time.perf_counter() + (math.inf if seconds is None else seconds)
    found = Run(device)
    for i, entry in enumerate(entries):
        print(f"{i + 1} of {len(entries)}: {entry}", file=sys.stderr)
        left, rest = deadline - time.perf_counter(), entries[i:]
        fixed = [fixed_cost(e) for e in rest]
        if fixed[0] > left:
            found.leave_out(entry, "all", "no time was left for it")
        else:
            length = (left - sum(fixed)) / sum(len(e.passes) for e in rest)
            length = max(min(length, row_seconds), min(SHORTEST, row_seconds))
            # What was measured so far is not lost with an entry that fails.
            found.attempt(entry, "all", found.measure, entry, length)
    return found
