"""Adversarial samples that stay on disk: examples for people, and all of them for other models to be judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from robplug.referee.guard import Outcome
from robplug.referee.store import CellStore
from robplug.referee.verify import Batch, Verdicts, has_values
from robplug.rng import Rng
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
    clean = batch.x[batch.attacked]
    fits = isinstance(x_adv, Tensor) and has_values(x_adv) and (x_adv.shape, x_adv.dtype) == (clean.shape, clean.dtype)
    fits = fits and not outcome.error  # what was not judged here is judged nowhere else
    place = {batch.ids[i]: k for k, i in enumerate(batch.attacked.nonzero().flatten().tolist())} if fits else {}
    if keep == "all":
        store.write_tensors("adversarials", index, _tensors(batch, outcome, place, list(place)))
    judged = [row for row in found.rows if row.status in ("broken", "robust") and row.sample in place]
    if index == 0 and judged:
        shown = [row.sample for row in sorted(judged, key=lambda row: row.status != "broken")[:EXAMPLES]]
        tensors = _tensors(batch, outcome, place, shown)
        images = {name: tensors[name].float() for name in ("x", "x_adv")}
        if batch.answer.dim() > 1 and found.answer is not None:  # to be drawn over the images
            rows = torch.tensor([place[sample] for sample in shown])
            images |= {"before": batch.answer[batch.attacked][rows].float(), "after": found.answer[rows].float()}
        arrays = {name: image.cpu().numpy() for name, image in images.items()}
        store.write_arrays("examples.safetensors", {"sample": tensors["sample"].numpy(), **arrays})


def keep_answers(index: int, batch: Batch, found: Verdicts, store: CellStore) -> None:
    """Stores the answers of a chunk where a figure of the cell needs all of them together, as a detector's precision.

    Those of samples that were not attacked are the clean ones.
    """
    if not isinstance(batch.task, Detection):
        return
    adv = batch.answer.clone()  # a file does not hold one memory twice
    if found.answer is not None:
        whole = together([batch.answer, found.answer])
        adv, attacked = whole[: len(batch.answer)].clone(), whole[len(batch.answer) :]
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
        if isinstance(witness, Tensor) and has_values(witness) and witness.shape[:1] == (len(place),):
            tensors["witness"] = witness.detach()[rows]
    return tensors


def keep_trace(index: int, batch: Batch, outcome: Outcome, store: CellStore) -> None:
    """Stores what an attack followed step by step, if it says so."""
    trace = getattr(outcome.perturbed, "trace", None)
    count = int(batch.attacked.sum())
    if isinstance(trace, Tensor) and has_values(trace) and trace.dim() == 2 and len(trace) == count:
        store.write_tensors("trace", index, {"trace": trace.float()})


def found_elsewhere(
    batch: Batch, kept: Sequence[dict[str, Tensor]], bounds: tuple[float, float], order: Rng | None
) -> tuple[Batch, Outcome]:
    """Returns a chunk, and the outcome that other models' adversarial samples are for it.

    Args:
        batch: the chunk as the judging model sees it.
        kept: of each source what `keep_samples` has stored for the same samples; perturbations of several are added.
        bounds: to which a sum is clipped.
        order: streams of the chunk's samples, by which rows and columns of the perturbation are put into random order;
            None leaves them.
    """
    places = [{sample: row for row, sample in enumerate(one["sample"].tolist())} for one in kept]
    made = [all(sample in place for place in places) for sample in batch.ids]
    batch = replace(batch, made=torch.tensor(made, dtype=torch.bool, device=batch.y.device))
    attacked = batch.attacked
    samples = [batch.ids[i] for i in attacked.nonzero().flatten().tolist()]
    found = [
        {name: tensor[[place[sample] for sample in samples]].to(batch.x.device) for name, tensor in one.items()}
        for one, place in zip(kept, places, strict=True)
    ]
    if len(found) == 1 and order is None:
        x_adv = found[0]["x_adv"].to(batch.x.dtype)
        return batch, Outcome(perturbed=Perturbed(x_adv, found[0].get("witness")))
    change = reduce(torch.add, (one["x_adv"].double() - one["x"].double() for one in found))
    if order is not None:
        change = order.select(attacked.cpu()).rearranged(change)
    x_adv = (batch.x[attacked].double() + change).clamp(*bounds).to(batch.x.dtype)
    return batch, Outcome(perturbed=Perturbed(x_adv))
