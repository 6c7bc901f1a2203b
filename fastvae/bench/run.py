"""A run: which cases in which order, each checked, then timed beside its baselines in rounds that call all."""

from __future__ import annotations

import copy
import importlib
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastvae.bench import baselines, check, devices, models
from fastvae.bench.baselines import Compiled, CudaGraph, Implementation, Timed, Torch
from fastvae.bench.cases import (
    BOTH,
    FORWARD,
    MIDDLE,
    MNIST,
    OPS,
    PIXELS_64,
    Case,
    growing,
    growing_batch,
    likelihood_cases,
    op_cases,
    pair_cases,
    sigmoid_cases,
)
from fastvae.bench.devices import Device
from fastvae.bench.models import Model

SECONDS = 0.5  # that a pass of a case is timed for, all its implementations together
SHORTEST = 0.05
WARM_UP = 0.3  # seconds, or three calls
ROUNDS = (7, 3000)
LAUNCH_BOUND = 1 << 20  # elements, up to which a CUDA graph is worth a row
JAX_LIMIT = 28  # log2 of the elements: its copy of the inputs passes through the host
AGAIN = "fastvae-again"  # the same code under another name: what of a ratio is noise

# Seconds that one entry takes besides its rows: rough, corrected while running. Measured on 2 cores of an AMD EPYC
# with nothing in Inductor's cache; a GPU's own are a guess.
COMPILING = {"case": 8.0, "step": 40.0, "tiny step": 12.0}
PER_ELEMENT = {"cpu": 4e-7, "cuda": 6e-9}


@dataclass
class Row:
    """One implementation in one pass. Times are seconds; `threads` is None where they are not set (a GPU)."""

    suite: str
    op: str
    shape: str
    dtype: str
    device: str
    which: str
    baseline: str
    median: float
    p20: float
    p80: float
    bytes: int | None = None
    bandwidth_fraction: float | None = None
    speedup: float | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    threads: int | None = None
    cache: str = "warm"
    rounds: int = 0
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        values = dict(self.__dict__)
        first = ("op", "shape", "dtype", "device")
        found = {name: values.pop(name) for name in first}
        found["pass"] = values.pop("which")
        suite = values.pop("suite")
        return found | values | {"suite": suite}


@dataclass(frozen=True)
class LeftOut:
    """What was not timed and why; `wrong` where it did not compute what it should."""

    what: str
    baseline: str
    reason: str
    wrong: bool = False


@dataclass(frozen=True)
class Entry:
    """One case or one model, and what to do with it."""

    suite: str
    case: Case
    model: Model | None = None
    passes: tuple[str, ...] = (BOTH,)
    cold: bool = False  # one more pass, of both, with caches emptied before each call
    compiled: bool = True
    jax: bool = True
    threads: int | None = None

    def __str__(self) -> str:
        name = f"step of {self.model.name}" if self.model else str(self.case)
        return f"{name}, {self.threads} thread" if self.threads else name

    @property
    def timings(self) -> int:
        return len(self.passes) + 2 * self.cold

    def fixed(self, device: str, modes: int) -> float:
        """About how many seconds it takes beyond the measuring."""
        kind = "case"
        if self.model:
            kind = "tiny step" if self.case.pixels < 1 << 18 else "step"
        programs = modes + self.case.after_sigmoid
        compiling = COMPILING[kind] * programs * self.compiled
        elements = self.case.pixels + self.case.latents + 8 * self.case.pairs
        return compiling + 1 + PER_ELEMENT[device] * elements * self.timings


@dataclass
class Result:
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    load: float | None = None  # of the machine, before the run
    copies: list[float] = field(default_factory=list)  # bytes a second, at the start
    copies_after: list[float] = field(default_factory=list)

    @property
    def wrong(self) -> list[LeftOut]:
        return [item for item in self.left_out if item.wrong]


# What is measured ---------------------------------------------------------------------------------


def plan(device: Device, quick: bool = False, ops: Sequence[str] = OPS) -> list[Entry]:
    """The entries in the order of their worth, as a run may have to stop early."""
    cuda = device.torch_device.type == "cuda"
    if quick:
        chosen = [Case("vae_loss", *MNIST), Case("vae_loss", *PIXELS_64)]
        chosen += [Case("sample_and_kl", *MIDDLE)]
        likely: list[Case] = []
        pairs: list[Case] = []
        left = [op for op in ops if op not in {case.op for case in chosen}]
        if set(ops) != set(OPS):  # asked for by name: the middle size of each
            chosen += [c for c in op_cases((torch.float32,)) if c.op in left][:3]
            likely = likelihood_cases(MNIST)
            pairs = [c for c in pair_cases() if c.op in left and c.pairs < LAUNCH_BOUND]
        entries = [Entry("ops", c, passes=c.passes) for c in chosen]
        entries += [Entry("likelihoods", c, compiled=False, jax=False) for c in likely]
        entries += [Entry("pairs", c, compiled=False, jax=False) for c in pairs]
        entries += [
            Entry("growth", growing(1 << n), compiled=False, jax=False) for n in (8, 14, 20)
        ]
        entries += [
            Entry("steps", m.case, m, passes=("step",), compiled=False) for m in models.MODELS[:1]
        ]
    else:
        entries = [
            Entry("ops", c, passes=c.passes, cold=c.dtype is torch.float32 and c.op != "noise")
            for c in op_cases((torch.float32,))
        ]
        entries += [Entry("steps", m.case, m, passes=("step",)) for m in models.MODELS]
        entries += [Entry("likelihoods", c, jax=False) for c in likelihood_cases()]
        entries += [Entry("pairs", c, passes=c.passes, jax=False) for c in pair_cases()]
        entries += [Entry("compiled", c, passes=c.passes) for c in sigmoid_cases()]
        top = 31 if cuda else 27
        sizes = [*range(8, top, 2), top]
        sizes.sort(key=lambda n: (n % 4 != 0, n))  # every second one first, the largest last
        growth = [Entry("growth", growing(1 << n), jax=n <= JAX_LIMIT) for n in sizes]
        coarse = [e for e in growth if e.case.pixels.bit_length() % 4 == 1]
        entries += coarse
        entries += [
            Entry("ops", c, passes=c.passes) for c in op_cases((torch.bfloat16, torch.float16))
        ]
        if not cuda and torch.get_num_threads() > 1:  # JAX's threads cannot be set while it runs
            entries += [
                Entry("threads", growing(1 << n), compiled=False, jax=False, threads=1)
                for n in range(8, 25, 2)
            ]
        entries += [Entry("batch", growing_batch(1 << n)) for n in range(0, 15, 2)]
        entries += growth[len(coarse) :]
    return [e for e in entries if e.case.op in ops]


def that_fit(entries: Sequence[Entry], device: Device) -> tuple[list[Entry], list[LeftOut]]:
    """The entries that the device's free memory has room for, and the others."""
    free = device.free_bytes()
    kept, dropped = [], []
    for entry in entries:
        elements = 2 * entry.case.pixels + 3 * entry.case.latents + 3 * entry.case.pairs
        inputs = elements * entry.case.dtype.itemsize
        if free is not None and 3 * inputs > free:  # the inputs, the gradients, some for the check
            dropped.append(LeftOut(str(entry), "all", "needs more memory than is free"))
        else:
            kept.append(entry)
    return kept, dropped


def estimate(entries: Sequence[Entry], device: Device, row_seconds: float) -> float:
    """About how many seconds the entries take."""
    return sum(_fixed(e, device) + e.timings * row_seconds for e in entries)


def _fixed(entry: Entry, device: Device) -> float:
    return entry.fixed(device.torch_device.type, len(device.modes))


# Timing -------------------------------------------------------------------------------------------


def interleave(
    device: Device, timed: Mapping[str, Timed], seconds: float, cold: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call, from rounds that call all in turn, in an order drawn for each round: whatever else the
    machine does meets all of them, and none always runs after the same other, on the caches and threads that one left."""
    order = list(timed)
    drawn = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in order}
    for call in timed.values():  # compiles, faults pages in, settles the allocator
        deadline = time.perf_counter() + WARM_UP
        for _ in range(3):
            device.time(call)
            if time.perf_counter() > deadline:
                break
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < ROUNDS[0] or (rounds < ROUNDS[1] and time.perf_counter() < deadline):
        drawn.shuffle(order)
        for name in order:
            times[name].append(device.time(timed[name], cold))
        rounds += 1
    return times


def _rows(
    device: Device,
    entry: Entry,
    timed: Mapping[str, Timed],
    seconds: float,
    op: str,
    which: str,
    cold: bool = False,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """A pass of a case: one row for each implementation."""
    least = entry.case.least_bytes(which) if which != "step" else None
    times = interleave(device, timed, seconds, cold)
    # Afterwards: by then all is compiled, and an optimizer has its state.
    memory = {} if cold else {n: device.memory_and_launches(t) for n, t in timed.items()}
    ours = statistics.median(times["fastvae"]) if "fastvae" in times else None
    rows = []
    for name, values in times.items():
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        middle = statistics.median(values)
        peak, launches = memory.get(name, (None, None))
        row = Row(
            suite=entry.suite,
            op=op,
            shape=entry.case.shape,
            dtype=entry.case.dtype_name,
            device=device.torch_device.type,
            which=which,
            baseline=name,
            median=middle,
            p20=fifths[0],
            p80=fifths[3],
            bytes=least,
            speedup=middle / ours if ours else None,
            peak_bytes=peak,
            launches=launches,
            threads=torch.get_num_threads() if device.gpu is None else None,
            cache="cold" if cold else "warm",
            rounds=len(values),
            note=(notes or {}).get(name, ""),
        )
        rows.append(row)
    return rows


def _reason(error: Exception) -> tuple[str, bool]:
    """An error in one line, and whether it is that memory ran out."""
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0][:200]}"
    return reason, "memory" in reason.lower()


class _Session:
    """Implementations of one entry: made, checked, and dropped with the reason where they fail."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.left_out: list[LeftOut] = []

    def drop(self, name: str, reason: str, wrong: bool = False) -> None:
        self.left_out.append(LeftOut(str(self.entry), name, reason, wrong))

    def attempt(self, name: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make` returns for `arguments`; None, and a note, where it raises."""
        try:
            return make(*arguments)
        except Exception as error:  # a competitor out of memory or without a compiler ends no run
            reason, memory = _reason(error)
            self.drop(name, reason, wrong=name == "fastvae" and not memory)
            return None


def _implementations(
    device: Device, entry: Entry, session: _Session
) -> tuple[dict[str, Implementation], dict[str, str]]:
    """All that are right, by name, and what to note on them."""
    case = entry.case
    inputs = case.inputs(device.torch_device)
    upstream = case.upstream(inputs)
    found: dict[str, Implementation] = {}

    def add(name: str, make: Callable[[], Implementation]) -> None:
        def checked() -> Implementation:
            made = make()
            if problem := check.wrong(case, inputs, upstream, *made.results()):
                session.drop(name, problem, wrong=True)
                raise _Wrong
            return made

        try:
            made = session.attempt(name, checked)
        except _Wrong:
            return
        if made is not None:
            found[name] = made

    plain = baselines.functions(case)
    for name, function in plain.items():
        add(name, partial(Torch, function, inputs, upstream))
    if "fastvae" in found:
        found[AGAIN] = found["fastvae"]
        if device.gpu is not None and case.pixels + case.latents <= LAUNCH_BOUND:
            add("fastvae-cuda-graph", partial(CudaGraph, plain["fastvae"], inputs, upstream))
    notes = {}
    rivals = [name for name in plain if name in found and name != "fastvae"]
    if entry.compiled and rivals:
        which = FORWARD if case.op == "noise" else BOTH
        times = interleave(device, {n: _timed(found[n], which) for n in rivals}, SHORTEST)
        fastest = min(rivals, key=lambda name: statistics.median(times[name]))
        for name, mode in device.modes.items():
            notes[name] = f"of {fastest}"
            add(name, partial(Compiled, plain[fastest], inputs, upstream, mode))
    if entry.compiled and case.after_sigmoid and "fastvae" in found:
        add("fastvae-compile", partial(Compiled, plain["fastvae"], inputs, upstream))
    if entry.jax and (jax := _jax(device)) is not None:
        add("jax", partial(jax.Jax, case, inputs, upstream))
    return found, notes


class _Wrong(BaseException):
    """Ends an attempt whose problem has been noted."""


def _timed(implementation: Implementation, which: str) -> Timed:
    timed = implementation.timed(which)
    assert timed is not None
    return timed


def _jax(device: Device) -> Any:
    """The module of the JAX baselines, or None where `why_no_jax` has a reason."""
    if why_no_jax(device) is None:
        return importlib.import_module("fastvae.bench.jax_baselines")
    return None


def why_no_jax(device: Device) -> str | None:
    try:
        module = importlib.import_module("fastvae.bench.jax_baselines")
    except ModuleNotFoundError:
        return "JAX is not installed: pip install jax"
    reason: str | None = module.why_not(device.torch_device)
    return reason


def _measure_case(device: Device, entry: Entry, seconds: float) -> tuple[list[Row], list[LeftOut]]:
    session = _Session(entry)
    found, notes = _implementations(device, entry, session)
    rows = []
    for which, cold in [(p, False) for p in entry.passes] + [(BOTH, True)] * entry.cold:
        timed = {}
        for name, made in found.items():
            if (one := session.attempt(name, made.timed, which)) is not None:
                timed[name] = one
        length = seconds * (2 if cold else 1)
        rows += _rows(device, entry, timed, length, entry.case.label, which, cold, notes)
    return rows, session.left_out


def _measure_step(device: Device, entry: Entry, seconds: float) -> tuple[list[Row], list[LeftOut]]:
    """A model's training step with each objective, and by its side the plain objectives without the networks."""
    assert entry.model is not None
    session = _Session(entry)
    torch.manual_seed(0)
    model = entry.model.build(device.torch_device.type == "cuda").to(device.torch_device)
    x = entry.model.data(entry.model.batch, device.torch_device)
    kinds = {"fastvae": ("fastvae", False), AGAIN: ("fastvae", False), "eager": ("eager", False)}
    if entry.compiled:
        kinds |= {"compile": ("eager", True), "fastvae-compile": ("fastvae", True)}
    steps: dict[str, Timed] = {}
    for name, (objective, compiled) in kinds.items():
        step = models.Step(copy.deepcopy(model), x, objective, compiled, entry.model.likelihood)
        problem = session.attempt(name, step.wrong)
        if problem:
            session.drop(name, problem, wrong=True)
        elif problem is not None:  # that is, where it did not raise
            steps[name] = step.timed()
    op = f"step: {entry.model.name}"
    rows = _rows(device, entry, steps, 4 * seconds, op, "step")
    alone: dict[str, Timed] = {
        name: models.objective_alone(entry.case, name, device.torch_device)
        for name in ("fastvae", "eager")
        if name in steps
    }
    rows += _rows(device, entry, alone, seconds, f"objective of: {entry.model.name}", BOTH)
    for row in rows:
        row.bytes = None  # of the networks nothing is known, and the sample's are counted elsewhere
    return rows, session.left_out


def run(
    device: Device,
    entries: Sequence[Entry],
    row_seconds: float,
    seconds: float | None = None,
    on_progress: Callable[[str, float, float], None] = lambda name, done, total: None,
) -> Result:
    """Measure all `entries`, each pass for `row_seconds`; or what can be measured in `seconds`: rows get shorter first,
    then the entries go for which no time is left, which come last in a plan.

    `on_progress` gets the entry's name and the seconds done and to do, by estimate.
    """
    # AOTAutograd's cache knows an op by its name, and would time what it was in another version of fastvae.
    functorch: Any = importlib.import_module("torch._functorch.config")
    functorch.enable_autograd_cache = False
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    result = Result(load=load, copies=devices.copy_bandwidth(device))
    deadline = math.inf if seconds is None else time.perf_counter() + seconds
    threads = torch.get_num_threads()
    costs = [_fixed(e, device) + e.timings * row_seconds for e in entries]
    spent = estimated = 1.0
    for i, entry in enumerate(entries):
        on_progress(str(entry), sum(costs[:i]), sum(costs))
        started = time.perf_counter()
        pace = spent / estimated  # how this machine compares with the estimates
        left = deadline - started
        if _fixed(entry, device) * pace > left:
            result.left_out.append(LeftOut(str(entry), "all", "no time was left for it"))
            continue
        length = row_seconds
        if seconds is not None:
            rest = entries[i:]
            for_rows = left - pace * sum(_fixed(e, device) for e in rest)
            length = for_rows / sum(e.timings for e in rest)
            length = min(max(length, min(SHORTEST, row_seconds)), row_seconds)
        torch._dynamo.reset()
        if entry.threads is not None:
            torch.set_num_threads(entry.threads)
        try:
            measure = _measure_step if entry.model else _measure_case
            rows, left_out = measure(device, entry, length)
        except Exception as error:  # what was measured so far is not lost
            reason, memory = _reason(error)
            rows, left_out = [], [LeftOut(str(entry), "all", reason, wrong=not memory)]
        finally:
            torch.set_num_threads(threads)
            device.release()
        result.rows += rows
        result.left_out += left_out
        spent += time.perf_counter() - started
        estimated += _fixed(entry, device) + entry.timings * length
    on_progress("", sum(costs), sum(costs))
    result.copies_after = devices.copy_bandwidth(device)
    bandwidth = statistics.median(result.copies + result.copies_after)
    for row in result.rows:
        if row.bytes:
            row.bandwidth_fraction = row.bytes / row.median / bandwidth
    return result
