"""What is written down beside the rows: cell.json and run.json."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from robplug.errors import StoreError
from robplug.referee.jobs import Job
from robplug.referee.keys import KEY_VERSION
from robplug.referee.plan import Plan
from robplug.referee.store import CellStore


def cell_record(job: Job, number: int, store: CellStore) -> dict[str, Any]:
    """Returns the content of cell.json, with the chunks that are finished already.

    Raises:
        StoreError: the cell was begun on another device or with another torch, and rows of the two must not be mixed.
    """
    cell = job.cell
    here = {"device": _device_name(job.target.device), "torch": torch.__version__}
    old = store.record()
    if old is not None and old["state"] != "finished" and old["chunks"]:
        for name, value in here.items():
            if old[name] != value:
                problem = (
                    f"was begun with {name} {old[name]} and would go on with {value}; use the old one, or remove it"
                )
                raise StoreError(store.path, problem)
    values = job.dataset.x.shape[1:].numel()
    readings = [{"eps": eps, "allowed": job.norm.allowed(eps, values, job.target.bounds)} for eps in cell.readings]
    return {
        "key_version": KEY_VERSION,
        "key": job.key,
        "index": number,
        "target": cell.target.name,
        "source": cell.source_name,
        "parts": [one.target.name for one in cell.sources],
        "task": job.target.task,
        "swept": cell.swept,
        "dataset": job.dataset.name,
        "attack": cell.spec.name,
        "label": cell.label,
        "canonical": cell.spec.canonical if cell.mode == "harmonised" else None,
        "library": cell.spec.origin,
        "mode": cell.mode,
        "threat": {
            "norm": cell.threat.norm,
            "eps": cell.threat.eps,
            "bounds": list(job.target.bounds),
            "targeted": cell.threat.targeted,
        },
        "goal_rule": cell.goal,
        "seed": cell.seed,
        "budget": cell.spec.budget,
        "needs": cell.spec.needs,
        "params_passed": cell.params_passed,
        "params_in_force": cell.params,
        "readings": readings,
        "digests": {
            "weights": job.identity.weights,
            "model_source": job.identity.model_source,
            "data": job.identity.data,
            "plugin": job.identity.plugin,
        },
        "versions": job.identity.versions,
        **({name: old[name] for name in here} if old is not None and old["chunks"] else here),
        "target_info": {"stochastic": job.target.stochastic, "eot": job.target.eot, "draws": job.target.draws},
        "samples": len(job.dataset),
        "state": old["state"] if old is not None else "unfinished",
        "chunks": old["chunks"] if old is not None else [],
        **({"quality": old["quality"]} if old is not None and "quality" in old else {}),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()  # sums are taken in another order with another number of them
    return f"cpu, {count} thread{'s' * (count > 1)}"


def provenance(plan: Plan, where: str) -> dict[str, Any]:
    """Returns the content of run.json: the plan, where it ran and with which versions."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    names = ("robplug", "torch", "numpy", "adversarial-robustness-toolbox", "foolbox", "torchattacks")
    return {
        "robplug": metadata.version("robplug"),
        "plan": plan.model_dump(mode="json"),
        "transfers": [
            {
                "sources": transfer.source_names(),
                "mixtures": [mixture.name for mixture in transfer.mixtures()],
                "victims": transfer.victims,
                "count": transfer.count,
            }
            for transfer in plan.transfer or ()
        ],
        "members": plan.members(),
        "plan_file": where,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "memory_gib": round(pages / 2**30, 1),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
