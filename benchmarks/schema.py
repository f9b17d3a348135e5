"""The form of the committed results; a test validates each file."""

from __future__ import annotations

import ctypes
import importlib.metadata as metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict


class Row(BaseModel):
    """One measurement.

    Attributes:
        case: what was measured on (a network, a shape).
        contender: whose code.
        median: of the repeats, in ``unit``.
        low: first quartile.
        high: third quartile.
        unit: of the three.
        ratio: median relative to the contender named by ``relative_to``, from the same run.
        relative_to: the contender that counts as 1.
        extra: whatever else belongs to it, such as a robust accuracy.
    """

    model_config = ConfigDict(extra="forbid")

    case: str
    contender: str
    median: float
    low: float
    high: float
    unit: str
    ratio: float
    relative_to: str
    extra: dict[str, float | int | str] = {}


class Result(BaseModel):
    """A committed file of results."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    benchmark: str
    command: str
    created: str
    hardware: dict[str, str | int | float | None]
    versions: dict[str, str | None]
    settings: dict[str, Any]
    rows: list[Row]
    findings: list[str]


def surroundings() -> dict[str, Any]:
    """Returns hardware and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    names = ("robplug", "torch", "adversarial-robustness-toolbox", "foolbox", "torchattacks", "numpy", "numba")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu},
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in names}},
    }


def keep_heap() -> str:
    """Tells glibc's malloc to keep the memory that is freed, and returns what was done, for the settings of a result.

    Else it goes back to the kernel and is fetched again, page by page, at every step: up to a tenth of a step's time,
    for one contender or another as the heap happens to lie. To be called before the first tensor.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or platform.libc_ver()[0] != "glibc":
        return "as the system does"
    trim_threshold, mmap_max = -1, -4
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)
    return "freed memory is kept"


def timed(contenders: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Times contenders side by side, round by round in a new order, so that no one always has the same predecessor."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = np.random.default_rng(0)
    for round_ in range(warmup + repeats):
        for name in order.permutation(list(contenders)).tolist():
            run = contenders[name]
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def rows(case: str, times: dict[str, list[float]], relative_to: str, scale: float = 1.0, unit: str = "s") -> list[Row]:
    """Returns a row per contender; ratios are medians of ratios within a round."""
    found = []
    for name, values in times.items():
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        ratio = statistics.median(a / b for a, b in zip(values, times[relative_to], strict=True))
        found.append(
            Row(
                case=case,
                contender=name,
                median=statistics.median(values) * scale,
                low=quartiles[0] * scale,
                high=quartiles[2] * scale,
                unit=unit,
                ratio=round(ratio, 4),
                relative_to=relative_to,
            )
        )
    return found


def write(result: Result, path: Path) -> None:
    """Writes and prints a result, losses too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result.model_dump(), indent=1) + "\n")
    for row in result.rows:
        extra = "  ".join(f"{key}={value}" for key, value in row.extra.items())
        print(f"{row.case:22} {row.contender:26} {row.median:9.3f} {row.unit:8} x{row.ratio:<7.3f} {extra}")
    for finding in result.findings:
        print(finding)
    print(f"written to {path}")
