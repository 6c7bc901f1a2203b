"""How a device is timed, how its memory is counted, and what it is called: all that differs between the CPU and CUDA."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from fastvae.bench.baselines import Timed

COPIES = 21
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}

# Or Kineto writes a line to stderr whenever a profile starts or stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class Device(Protocol):
    """One device; `modes` are torch.compile's that make sense there, by the baseline's name."""

    torch_device: torch.device
    modes: dict[str, str | None]
    gpu: str | None

    def time(self, timed: Timed, cold: bool = False) -> float:
        """Seconds of one call, caches emptied before it if `cold`."""

    def memory_and_launches(self, timed: Timed) -> tuple[int | None, int | None]:
        """Bytes that one call holds at most beyond what it was given, and the kernels that it launches."""

    def free_bytes(self) -> int | None:
        """Memory that can still be had, where that is known."""

    def release(self) -> None:
        """Give back what the allocator keeps between two cases."""


def _host_time(timed: Timed) -> float:
    state = timed.setup()
    started = time.perf_counter()
    result = timed.call(state)
    seconds = time.perf_counter() - started
    del result, state  # freeing is not timed
    return seconds


class Cpu:
    """The host's clock; memory from the allocator's events in torch.profiler."""

    gpu: str | None = None

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.modes: dict[str, str | None] = {"compile": None}
        self._flush: torch.Tensor | None = None

    def time(self, timed: Timed, cold: bool = False) -> float:
        if cold:
            if self._flush is None:
                self._flush = torch.empty(1 << 25)  # 128 MiB: more than the last cache of most
            self._flush.fill_(1.0)
        return _host_time(timed)

    def memory_and_launches(self, timed: Timed) -> tuple[int | None, int | None]:
        if timed.host_clock:  # another library's memory
            return timed.peak_bytes, None
        state = timed.setup()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = timed.call(state)
        del result, state
        return peak_of(_trace(profiler)), None

    def free_bytes(self) -> int | None:
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):  # macOS does not say
            return None

    def release(self) -> None:
        self._flush = None


def _trace(profiler: Any) -> list[dict[str, Any]]:
    """A profile's events, in the one format that is documented."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def peak_of(events: list[dict[str, Any]]) -> int:
    """The most bytes that were held at once, of those allocated in the profile."""
    held = peak = 0
    memory = [e for e in events if e.get("name") == "[memory]"]
    for event in sorted(memory, key=lambda e: float(e["ts"])):
        held += int(event["args"]["Bytes"])
        peak = max(peak, held)
    return peak


def kernels_of(events: list[dict[str, Any]]) -> int:
    """How many kernels ran on a GPU: no copies, no fills, no annotations."""
    return sum(e.get("cat") == "kernel" for e in events)


class Cuda:
    """CUDA events on an idle device, so that what the host takes to launch is in the time, as a user meets it."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        self.modes: dict[str, str | None] = {
            "compile": None,
            "compile-reduce-overhead": "reduce-overhead",
        }
        properties: Any = torch.cuda.get_device_properties(self.torch_device)
        self.gpu: str | None = properties.name
        self.cache = int(properties.L2_cache_size)
        self._flush: torch.Tensor | None = None
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time(self, timed: Timed, cold: bool = False) -> float:
        if cold:
            if self._flush is None:
                self._flush = torch.empty(
                    2 * self.cache, dtype=torch.uint8, device=self.torch_device
                )
            self._flush.zero_()
        if timed.host_clock:  # another library's stream: its call waits for the result
            torch.cuda.synchronize()
            return _host_time(timed)
        state = timed.setup()
        torch.cuda.synchronize()
        begin, end = self._events
        begin.record()
        result = timed.call(state)
        end.record()
        end.synchronize()
        del result, state
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3

    def memory_and_launches(self, timed: Timed) -> tuple[int | None, int | None]:
        if timed.host_clock:  # another library's memory and stream
            return timed.peak_bytes, None
        state = timed.setup()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = timed.call(state)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        if timed.peak_bytes is not None:
            peak = timed.peak_bytes
        del result, state

        state = timed.setup()
        torch.cuda.synchronize()  # what the set-up launched is not counted
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            result = timed.call(state)
            torch.cuda.synchronize()
        del result, state
        return peak, kernels_of(_trace(profiler)) or None  # none where the profiler may not look

    def free_bytes(self) -> int | None:
        free, _ = torch.cuda.mem_get_info()
        return free

    def release(self) -> None:
        self._flush = None
        torch.cuda.empty_cache()


def of(name: str) -> Device:
    """The device called `name`.

    Raises:
        RuntimeError, AssertionError: torch has no such device.
    """
    device = torch.device(name)
    if device.type not in COPY_BYTES:
        raise RuntimeError(f"there are benchmarks for {' and '.join(COPY_BYTES)} only")
    torch.zeros(1, device=device)
    return Cuda(device) if device.type == "cuda" else Cpu()


def copy_bandwidth(device: Device) -> list[float]:
    """Bytes a second, read and written, of `copy_` between two buffers that no cache holds; one for each copy."""
    size = COPY_BYTES[device.torch_device.type]
    if (free := device.free_bytes()) is not None:
        while size > 1 << 20 and size > free // 4:
            size //= 2
    source = torch.ones(size // 4, device=device.torch_device)
    target = torch.empty_like(source)
    copy = Timed(lambda _: target.copy_(source))
    times = [device.time(copy) for _ in range(COPIES + 3)][3:]
    return [2 * size / seconds for seconds in times]
