"""ART: its attacks and classifiers in robplug (inward.py, targets.py), robplug's attacks and defences in ART."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from art.attacks.attack import EvasionAttack
    from art.defences.trainer import Trainer
    from art.estimators.classification import PyTorchClassifier
    from art.estimators.object_detection import PyTorchObjectDetector


def attack(name: str, estimator: PyTorchClassifier | PyTorchObjectDetector, **params: Any) -> EvasionAttack:
    """Makes an ART attack of a robplug attack.

    Args:
        name: as in ``robplug list attacks``.
        estimator: a ``PyTorchClassifier`` with ``clip_values``, or a ``PyTorchObjectDetector`` for an attack that
            serves detection; ART has no estimators for segmentation.
        **params: ``eps``, left out for an attack that looks for the smallest distance; ``norm``, the first that the
            attack serves without; ``targeted``; ``batch_size``; ``seed``; ``backward="identity"`` to let gradients pass
            preprocessing defences that have none; and the attack's own parameters.

    Returns:
        An attack to be called as any other of ART, ``attack.generate(x, y)``; ``set_params`` changes its parameters.

    Raises:
        UnknownNameError: no plugin has it.
        InputError: it has no such parameter, needs to be fitted to a data set, or asks for more than the estimator has.
        ThreatError: it does not serve the norm or ``targeted``, eps is missing or out of place, or it serves neither
            classification nor detection.
        art.exceptions.EstimatorError: the estimator is of another kind.

    Example:
        >>> import numpy, torch
        >>> from art.estimators.classification import PyTorchClassifier
        >>> from robplug.adapters.art import attack
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> classifier = PyTorchClassifier(net, loss, input_shape=(1, 2, 2), nb_classes=3, clip_values=(0, 1))
        >>> pgd = attack("robplug/pgd", classifier, eps=0.1, steps=5)
        >>> pgd.generate(numpy.full((2, 1, 2, 2), 0.5, dtype="float32")).shape
        (2, 1, 2, 2)
    """
    from robplug.adapters.art.outward import make_attack

    return make_attack(name, estimator, **params)


def trainer(name: str | Iterable[Any], estimator: PyTorchClassifier, **params: Any) -> Trainer:
    """Makes an ART trainer of a robplug defence.

    Args:
        name: as in ``robplug list defenses``; several names, or defences, make a stack.
        estimator: a ``PyTorchClassifier`` with an optimizer; it is trained in place.
        **params: ``seed``, and of a single name the defence's own parameters.

    Returns:
        A trainer to be used as any other of ART: ``fit(x, y, batch_size=, nb_epochs=)``.

    Raises:
        UnknownNameError: no plugin has it.
        InputError: it has no such parameter, or does not fit the estimator.

    Example:
        >>> import numpy, torch
        >>> from art.estimators.classification import PyTorchClassifier
        >>> from robplug.adapters.art import trainer
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> options = {"optimizer": torch.optim.SGD(net.parameters(), lr=0.1), "clip_values": (0, 1)}
        >>> classifier = PyTorchClassifier(net, torch.nn.CrossEntropyLoss(), (1, 2, 2), 3, **options)
        >>> x, y = numpy.full((4, 1, 2, 2), 0.5, dtype="float32"), numpy.array([0, 1, 2, 0])
        >>> trainer("robplug/at", classifier, eps=0.1).fit(x, y, batch_size=2, nb_epochs=1)
    """
    from robplug.adapters.art.training import make_trainer

    return make_trainer(name, estimator, **params)
