"""How an implementation is called, and how a device times it and counts its memory and launches."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import tempfile
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Function = Callable[..., Any]
FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "both")
COPIES = 21
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
WARM_UP = 0.3  # seconds, or three calls
ROUNDS = (7, 3000)

# Or Kineto writes a line to stderr whenever a profile starts or stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Timed:
    """``call(setup())``: neither the set-up is timed, nor freeing what the call returns."""

    call: Function
    setup: Function = lambda: None
    host_clock: bool = False  # not on torch's CUDA stream, so that its events would not see it
    peak_bytes: int | None = None  # where torch's allocator does not know it


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class Torch:
    """A function of tensors, differentiated by autograd.

    Gradients are taken with ``autograd.grad``: ``backward()`` would add to the leaves' own, with a copy where the gradient is the
    upstream tensor itself, which in a network is not so.
    """

    def __init__(
        self, function: Function, inputs: list[Tensor], upstream: list[Tensor | None]
    ) -> None:
        self.function, self.inputs, self.upstream = function, inputs, upstream
        self.wanted = [t for t in inputs if t.requires_grad]

    def forward(self, _: Any = None) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return as_tuple(self.function(*self.inputs))

    def backward(self, outputs: tuple[Tensor, ...]) -> Any:
        return torch.autograd.grad(outputs, self.wanted, self.upstream)

    def both(self, _: Any = None) -> tuple[Any, Any]:
        outputs = as_tuple(self.function(*self.inputs))
        return outputs, self.backward(outputs) if outputs[0].requires_grad else ()

    def timed(self, which: str) -> Timed:
        def setup() -> Any:  # with CUDA graphs: the outputs of the call before may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
            return as_tuple(self.function(*self.inputs)) if which == BACKWARD else None

        return Timed(getattr(self, which), setup)


def compiled(function: Any, mode: str | None = None) -> Function:
    """`function` compiled for the shapes it meets first, as in a program of its own.

    A copy of it: Dynamo keeps what it compiled with the code, where two closures of one code would look through each other's
    programs in every call. Reset Dynamo between cases: it would compile the second shape it meets for sizes that vary.
    """

    def call(*inputs: Any) -> Any:
        return function(*inputs)

    own = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    made: Function = torch.compile(own, fullgraph=True, dynamic=False, mode=mode)
    return made


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
        self.modes: dict[str, str | None] = {"compile": None}  # of torch.compile
        flush = 1 << 27  # bytes: more than the last cache of most
        if self.type == "cuda":
            torch.cuda.set_device(self.torch_device)
            properties: Any = torch.cuda.get_device_properties(self.torch_device)
            self.gpu, flush = properties.name, 2 * properties.L2_cache_size
            self.modes["compile-reduce-overhead"] = "reduce-overhead"
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.flush = torch.empty(flush, dtype=torch.uint8, device=self.torch_device)

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def time(self, timed: Timed, cold: bool = False) -> float:
        """Seconds of one call, caches emptied before it if `cold`."""
        if cold:
            self.flush.fill_(1)
        state = timed.setup()
        self.synchronize()
        if self.gpu and not timed.host_clock:
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

    def memory_and_launches(self, timed: Timed) -> tuple[int | None, int | None]:
        """Bytes that one call holds at most beyond what it was given, and the kernels that it launches."""
        if timed.host_clock:  # another library's memory
            return timed.peak_bytes, None
        state = timed.setup()
        self.synchronize()
        activities, before = [ProfilerActivity.CPU], 0
        if self.gpu:
            activities.append(ProfilerActivity.CUDA)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        with profile(activities=activities, profile_memory=not self.gpu) as profiler:
            result = timed.call(state)
            self.synchronize()
        del result
        with tempfile.TemporaryDirectory() as folder:  # the one format that is documented
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        if not self.gpu:
            return peak_of(events), None
        launches = kernels_of(events) or None  # none where the profiler may not look
        return torch.cuda.max_memory_allocated() - before, launches

    def free_bytes(self) -> float:
        """Memory that can still be had; infinite where that is not known."""
        if self.gpu:
            return float(torch.cuda.mem_get_info()[0])
        if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS does not say
            return math.inf
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

    def copy_bandwidth(self) -> list[float]:
        """Bytes a second, read and written, of `copy_` between two buffers that no cache holds; one for each copy."""
        size = int(min(COPY_BYTES[self.type], max(self.free_bytes() // 4, 1 << 20)))
        source = torch.ones(size // 4, device=self.torch_device)
        target = torch.empty_like(source)
        copy = Timed(lambda _: target.copy_(source))
        return [2 * size / self.time(copy) for _ in range(COPIES + 3)][3:]


def peak_of(events: list[dict[str, Any]]) -> int:
    """The most bytes that were held at once, of those allocated in the profile."""
    memory = [e for e in events if e.get("name") == "[memory]"]
    memory.sort(key=lambda e: float(e["ts"]))
    return max(itertools.accumulate((int(e["args"]["Bytes"]) for e in memory), initial=0))


def kernels_of(events: list[dict[str, Any]]) -> int:
    """How many kernels ran on a GPU: no copies, no fills, no annotations."""
    return sum(e.get("cat") == "kernel" for e in events)


def interleave(
    device: Device, timed: Mapping[str, Timed], seconds: float, cold: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call, from rounds that call all in turn, in an order drawn for each round: whatever else the
    machine does meets all of them, and none always runs after the same other, on the caches and threads that one left."""
    order, drawn = list(timed), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in order}
    for call in timed.values():  # compiles, faults pages in, settles the allocator
        deadline = time.perf_counter() + WARM_UP
        for _ in range(3):
            device.time(call)
            if time.perf_counter() > deadline:
                break
    deadline = time.perf_counter() + seconds
    for i in range(ROUNDS[1]):
        if i >= ROUNDS[0] and time.perf_counter() > deadline:
            break
        drawn.shuffle(order)
        for name in order:
            times[name].append(device.time(timed[name], cold))
    return times
