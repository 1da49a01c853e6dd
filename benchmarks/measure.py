"""Times and memory of calls that are compared in one process."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable

import torch


def machine(threads: int) -> str:
    """One line on what the figures were taken with, the load included."""
    processor = platform.processor() or platform.machine()
    return f"torch {torch.__version__}, {processor}, {threads} threads of {os.cpu_count()} cores, {load()}"


def load() -> str:
    """How many processes wanted a core in the last minute, this one among them."""
    return f"load {os.getloadavg()[0]:.1f}"


def peak_bytes(call: Callable[[], object]) -> int:
    """Highest sum of live tensor bytes that ``call`` allocates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = live = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def minima(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of every call over interleaved rounds.

    With one thread these are seconds of the processor, which other processes disturb less than the wall clock's.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            taken = clock() - start
            times[name] = min(times.get(name, taken), taken)
    return times
