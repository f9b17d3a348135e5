"""The training loop that defences plug into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robplug import checkpoint, training_record
from robplug.checkpoint import Checkpoint
from robplug.data import Dataset
from robplug.defenses import Defense, Losses, Stack
from robplug.errors import InputError, StoreError
from robplug.interrupt import deferred_interrupt
from robplug.isolation import cpu_threads, seeded_globals
from robplug.referee.store import explained
from robplug.rng import Rng
from robplug.step import Step
from robplug.targets import evaluation_mode
from robplug.training_plan import Options, read_options
from robplug.training_progress import Progress, say_finished
from robplug.training_setup import (
    check_data,
    check_task,
    differences,
    identity,
    make_fabric,
    make_optimizer,
    split_rows,
    sub_seed,
)

FINITE = "a finite loss"
"""What the error of a training that diverges says was expected."""


def fit(
    model: nn.Module,
    dataset: Dataset,
    defenses: str | Defense | Iterable[str | Defense] = (),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    origin: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Trains a model with a stack of defences, with Lightning Fabric.

    Every random draw follows from the seed and the number of the step: on the CPU in single precision, with as many
    threads, a training that was interrupted and resumed ends with the same weights bit for bit. Global generators are
    left as they were.

    Args:
        model: trained in place; maps samples inside the data's bounds to logits, or is a detector with ``losses``. It
            ends on the device where it was.
        dataset: the training data.
        defenses: names of ``robplug list defenses``, defences, or both.
        out: folder for ``weights.safetensors`` and ``train.json``, and for a checkpoint after each epoch and at Ctrl-C,
            which is removed at the end. What an earlier training has left there is replaced, unless ``resume``.
        resume: go on from the checkpoint in ``out``, if there is one; where this very training was finished there,
            nothing is trained, and the model gets its weights.
        progress: print a line for each epoch.
        origin: where the training comes from, such as the digest of the first weights; values that JSON has. Recorded,
            and compared at a resume.
        **options: as in `robplug.training_plan.Options`.

    Returns:
        The trained model in eval mode, after every defence's ``finish``.

    Raises:
        InputError: options, data or defences that do not fit.
        StoreError: ``out`` cannot be used; or, at a resume, what it has is of another training.
        KeyboardInterrupt: Ctrl-C, after the step that was being made; the checkpoint is written.
    """
    settings, stack = read_options(options), Stack(defenses)
    check_data(dataset, settings, stack)
    check_task(model, dataset, settings, stack)
    folder = None if out is None else _make_folder(Path(out))
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with cpu_threads(settings.threads):
        training = _Training(model, dataset, stack, settings, folder, progress, origin or {})
        left = None
        try:
            if folder is not None and resume and not training.resume(folder):
                left = training_record.load(folder, training.identity())
            if left is None:
                training.run()
        finally:
            trained = stack.finish().to(home).eval()
    if folder is not None and left is not None:
        return _with_weights(trained, left, folder, progress)
    if folder is not None:
        training_record.save(folder, trained.state_dict(), training.identity(), training.history)
        checkpoint.clear(folder)
    return trained


class _Training:
    """A training under way.

    Attributes:
        step: steps made so far.
        sums: of the epoch under way: samples, and each loss times its samples.
        history: a record of each finished epoch.
        best: the parameters and buffers of the best score, where a defence has patience.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        stack: Stack,
        options: Options,
        folder: Path | None,
        progress: bool,
        origin: Mapping[str, Any],
    ) -> None:
        self.origin = dict(origin)
        self.stack, self.dataset, self.options, self.folder = stack, dataset, options, folder
        self.train_rows, self.held_rows = split_rows(len(dataset), options)
        self.batches = math.ceil(len(self.train_rows) / options.batch_size)
        self.fabric = make_fabric(options)
        self.model = model.to(self.fabric.device)
        with seeded_globals(sub_seed(options.seed, "prepare")):
            stack.prepare(self.model)
        self.optimizer = make_optimizer(self.model, stack, options)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step = 0
        self.sums: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.progress = Progress(options.epochs) if progress else None

    def run(self) -> None:
        """Trains until the last epoch, or until patience has run out."""
        _, optimizer = self.fabric.setup(self.model, self.optimizer)
        order: list[Tensor] = []
        with deferred_interrupt() as interrupted:
            while self.step < self.options.epochs * self.batches and not self._out_of_patience():
                epoch, batch = divmod(self.step, self.batches)
                if batch == 0 or not order:
                    order = self._order(epoch)
                    self.stack.train_mode()
                self._train(order[batch], optimizer)
                if self.step % self.batches == 0:
                    self._close_epoch()
                if interrupted():
                    self._save()
                    raise KeyboardInterrupt
        if self.best:
            self._restore(self.best)

    def _order(self, epoch: int) -> list[Tensor]:
        """Returns the rows of each batch of an epoch."""
        generator = torch.Generator().manual_seed(sub_seed(self.options.seed, "order", epoch))
        shuffled = self.train_rows[torch.randperm(len(self.train_rows), generator=generator)]
        return list(shuffled.split(self.options.batch_size))

    def _batch(self, rows: Tensor, rng: Rng) -> Step:
        x, y = (tensor[rows].to(self.fabric.device) for tensor in (self.dataset.x, self.dataset.y))
        return Step(self.model, x, y, rng, self.dataset.bounds, task=self.dataset.task)

    def _train(self, rows: Tensor, optimizer: Any) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._rate()
        ids = (rows + self.step * len(self.dataset)).tolist()
        step = self._batch(rows, Rng(sub_seed(self.options.seed, "draws"), ids))
        with seeded_globals(sub_seed(self.options.seed, "step", self.step)):
            losses = self.stack.train_batch(step, optimizer, self.fabric.backward, self.fabric.autocast())
        if not bool(losses.total.isfinite()):
            raise InputError(FINITE, f"{losses.total.item()} at step {self.step}", "lower lr, or a strength")
        self.step += 1
        for name, value in _values(losses).items():
            self.sums[name] = self.sums.get(name, 0.0) + value * len(rows)

    def _rate(self) -> float:
        """Returns the learning rate as a share of the first one."""
        if self.options.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * self.step / (self.options.epochs * self.batches)))
        if self.options.schedule == "constant":
            return 1.0
        return float(0.1 ** sum(self.step >= epoch * self.batches for epoch in self.options.schedule))

    def _close_epoch(self) -> None:
        record: dict[str, Any] = {"epoch": self.step // self.batches}
        record.update({name: total / len(self.train_rows) for name, total in self.sums.items()})
        if len(self.held_rows):
            record["held_out"] = self._score()
        if self.stack.patience is not None and record["held_out"] > max(self._scores(), default=-1.0):
            self.best = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        self.history.append(record)
        self.sums = {}
        self._save()
        if self.progress:
            self.progress.show(record, len(self.train_rows))

    def _score(self) -> float:
        seed = sub_seed(self.options.seed, "score")
        right = 0.0
        with evaluation_mode(self.model), self.fabric.autocast(), seeded_globals(seed):
            for rows in self.held_rows.split(self.options.batch_size):
                right += float(self.stack.score(self._batch(rows, Rng(seed, rows.tolist()))).sum())
        return right / len(self.held_rows)

    def _scores(self) -> list[float]:
        return [record["held_out"] for record in self.history]

    def _out_of_patience(self) -> bool:
        if self.stack.patience is None or not self.history:
            return False
        scores = self._scores()
        return len(scores) - 1 - scores.index(max(scores)) >= self.stack.patience

    def _tensors(self) -> dict[str, Tensor]:
        """Returns all that training moves: the model's parameters and buffers, and parameters that a defence keeps."""
        own = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        inside = {id(tensor) for tensor in own.values()}
        others = [parameter for parameter in self.stack.new_parameters if id(parameter) not in inside]
        return {**own, **{f"defenses:{index}": parameter for index, parameter in enumerate(others)}}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        own = self._tensors()
        if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in tensors.items()}:
            raise StoreError(
                self.folder, f"its checkpoint is of another model; remove {checkpoint.FILES} to start over"
            )
        for name, tensor in tensors.items():
            own[name].detach().copy_(tensor)

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors = {**self._tensors(), **{f"best:{name}": tensor for name, tensor in self.best.items()}}
        record = {"training": self.identity(), "sums": self.sums, "history": self.history}
        Checkpoint(self.step, tensors, self.optimizer.state_dict(), record).save(self.folder)

    def resume(self, folder: Path) -> bool:
        """Goes on from the checkpoint of a folder; returns whether there is one."""
        found = checkpoint.load(folder)
        if found is None:
            return False
        other = differences(self.identity(), found.record["training"])
        if other:
            remedy = f"train that one to its end, or remove {checkpoint.FILES} to start over"
            raise StoreError(folder, f"its checkpoint was made with {other}; {remedy}")
        self._restore({name: tensor for name, tensor in found.tensors.items() if not name.startswith("best:")})
        self.best = {name[5:]: tensor for name, tensor in found.tensors.items() if name.startswith("best:")}
        self.optimizer.load_state_dict(dict(found.optimizer))
        self.step, self.sums, self.history = found.step, found.record["sums"], found.record["history"]
        return True

    def identity(self) -> dict[str, Any]:
        """Returns what makes this training another than others."""
        return identity(self.model, self.options, self.stack.defenses, self.dataset, self.origin)


def _make_folder(folder: Path) -> Path:
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _with_weights(trained: nn.Module, state: Mapping[str, Tensor], folder: Path, progress: bool) -> nn.Module:
    """Returns a finished training's model with the weights that it has left."""
    try:
        trained.load_state_dict(state)
    except RuntimeError as error:
        remedy = f"choose another out, or remove {training_record.RECORD} to train anew"
        raise StoreError(folder / training_record.WEIGHTS, f"are weights of another model; {remedy}") from error
    if progress:
        say_finished()
    return trained


def _values(losses: Losses) -> dict[str, float]:
    """Returns what is averaged over an epoch; penalties by the name of their defence."""
    right = {} if losses.right is None else {"accuracy": float(losses.right.float().mean())}
    penalties = {name: float(value) for name, value in losses.penalties.items()}
    return {"loss": float(losses.objective), **right, **penalties}
