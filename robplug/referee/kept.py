"""Adversarial samples that stay on disk: examples for people, and all of them for other models to be judged on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robplug.referee.guard import Outcome
from robplug.referee.store import CellStore
from robplug.referee.verify import PLAIN, Batch, Verdicts
from robplug.tasks import Detection, together
from robplug.types import Perturbed

EXAMPLES = 8
"""Images of a cell that are kept for the report."""


def keep_samples(keep: str, index: int, batch: Batch, found: Verdicts, outcome: Outcome, store: CellStore) -> None:
    """Stores adversarial samples of a chunk.

    Args:
        keep: ``"all"``: all that could be measured, with their witnesses; of the first chunk also a few examples with
            the broken ones first; ``"examples"``: those alone; ``"none"``: nothing.
        index: number of the chunk.
        batch: the chunk.
        found: its verdicts.
        outcome: what the attack returned for ``batch.attacked``.
        store: of the cell.
    """
    if keep == "none" or (keep == "examples" and index > 0):
        return
    x_adv = getattr(outcome.perturbed, "x_adv", None)
    fits = isinstance(x_adv, Tensor) and type(x_adv) in PLAIN and x_adv.shape == batch.x[batch.attacked].shape
    place = {batch.ids[i]: k for k, i in enumerate(batch.attacked.nonzero().flatten().tolist())} if fits else {}
    if keep == "all":
        store.write_tensors("adversarials", index, _tensors(batch, outcome, place, list(place)))
    judged = [row for row in found.rows if row.status in ("broken", "robust") and row.sample in place]
    if index == 0 and judged:
        shown = [row.sample for row in sorted(judged, key=lambda row: row.status != "broken")[:EXAMPLES]]
        tensors = _tensors(batch, outcome, place, shown)
        images = {name: tensors[name].float() for name in ("x", "x_adv")}
        store.write_arrays(
            "examples.safetensors",
            {"sample": tensors["sample"].numpy(), **{name: image.cpu().numpy() for name, image in images.items()}},
        )


def keep_answers(index: int, batch: Batch, found: Verdicts, store: CellStore) -> None:
    """Stores the answers of a chunk where a figure of the cell needs all of them together, as a detector's precision.

    Those of samples that were not attacked are the clean ones.
    """
    if not isinstance(batch.task, Detection):
        return
    adv = batch.answer
    if found.answer is not None:
        whole = together([batch.answer, found.answer])
        clean, attacked = whole[: len(batch.answer)], whole[len(batch.answer) :]
        adv = clean.clone()
        adv[batch.attacked] = attacked
    tensors = {"sample": torch.tensor(batch.ids, dtype=torch.int64), "clean": batch.answer, "adv": adv}
    store.write_tensors("answers", index, tensors)


def _tensors(batch: Batch, outcome: Outcome, place: dict[int, int], samples: list[int]) -> dict[str, Tensor]:
    rows = [place[sample] for sample in samples]
    clean = batch.x[batch.attacked][rows]
    tensors = {"sample": torch.tensor(samples, dtype=torch.int64), "x": clean, "x_adv": clean.clone()}
    if samples and outcome.perturbed is not None:
        tensors["x_adv"] = outcome.perturbed.x_adv.detach()[rows]
        witness = outcome.perturbed.witness
        if isinstance(witness, Tensor) and type(witness) in PLAIN and len(witness) == len(place):
            tensors["witness"] = witness.detach()[rows]
    return tensors


def found_elsewhere(batch: Batch, kept: dict[str, Tensor]) -> tuple[Batch, Outcome]:
    """Returns a chunk, and the outcome that another model's adversarial samples are for it.

    Args:
        batch: the chunk as the judging model sees it.
        kept: what `keep_samples` has stored for the same samples.
    """
    place = {sample: row for row, sample in enumerate(kept["sample"].tolist())}
    made = torch.tensor([sample in place for sample in batch.ids], dtype=torch.bool, device=batch.y.device)
    batch = replace(batch, made=made)
    rows = [place[batch.ids[i]] for i in batch.attacked.nonzero().flatten().tolist()]
    x_adv = kept["x_adv"][rows].to(device=batch.x.device, dtype=batch.x.dtype)
    witness = kept["witness"][rows].to(batch.x.device) if "witness" in kept else None
    return batch, Outcome(perturbed=Perturbed(x_adv, witness))
