"""What robplug-ghost offers to the host."""

from __future__ import annotations

from robplug import TargetSpec, hookimpl

PAPER = "Li et al. 2020, Learning Transferable Adversarial Examples via Ghost Networks"
SKIP = {"skip": 0.22, "shortcuts": None}
DROPOUT = {"dropout": 0.994, "blocks": None}
SERIES = {"ghosts": None, "seed": 0}


@hookimpl
def robplug_targets() -> list[TargetSpec]:
    """Ensembles of ghosts of one target, which a plan names in ``of``."""
    return [
        TargetSpec(
            name="ghost/skip-erosion",
            make="robplug_ghost.targets:skip_erosion",
            summary="a network whose shortcuts are weighted at random, anew in each forward pass",
            source=f"{PAPER}, skip connection erosion",
            of="one",
            params={**SKIP, **SERIES},
        ),
        TargetSpec(
            name="ghost/dropout-erosion",
            make="robplug_ghost.targets:dropout_erosion",
            summary="a network with dropout after each top-level block, anew in each forward pass",
            source=f"{PAPER}, dropout erosion",
            of="one",
            params={**DROPOUT, **SERIES},
        ),
        TargetSpec(
            name="ghost/both",
            make="robplug_ghost.targets:both",
            summary="skip erosion and dropout erosion together",
            source=PAPER,
            of="one",
            params={**SKIP, **DROPOUT, **SERIES},
        ),
    ]
