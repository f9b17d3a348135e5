"""The host's own plugin: it uses the hooks as any other does."""

from __future__ import annotations

from robplug.hookspecs import hookimpl
from robplug.types import AttackSpec, DatasetSpec, DefenseSpec, NormSpec, TargetSpec


@hookimpl
def robplug_attacks() -> list[AttackSpec]:
    """The baselines."""
    pixel = ("linf", "l2", "l1")
    every = ("classification", "segmentation", "detection")
    return [
        AttackSpec(
            name="robplug/fgsm",
            make="robplug.attacks:FGSM",
            summary="one steepest step of length eps",
            source="Goodfellow et al. 2015, section 4",
            norms=pixel,
            tasks=every,
            canonical="fgsm",
        ),
        AttackSpec(
            name="robplug/pgd",
            make="robplug.attacks:PGD",
            summary="projected gradient descent; broken samples leave the batch",
            source="Madry et al. 2018, section 2.1",
            params={
                "steps": 20,
                "step_size": None,
                "random_start": True,
                "restarts": 1,
                "early_stop": True,
                "transform": None,
                "draws": 1,
            },
            norms=pixel,
            tasks=every,
            stochastic=True,
            canonical="pgd",
        ),
        AttackSpec(
            name="robplug/cw",
            make="robplug.carlini:CarliniWagner",
            summary="Carlini and Wagner's search for the smallest l2 distance",
            source="Carlini and Wagner 2017, section VI.A",
            params={
                "steps": 100,
                "step_size": 0.01,
                "confidence": 0.0,
                "binary_search_steps": 5,
                "initial_const": 0.01,
                "abort_early": True,
                "restarts": 1,
                "start_radius": 1.0,
                "transform": None,
                "draws": 1,
            },
            norms=("l2",),
            budget="minimal",
            stochastic=True,
            canonical="cw",
            harmonise="robplug.carlini:harmonised",
        ),
        AttackSpec(
            name="robplug/noise",
            make="robplug.attacks:Noise",
            summary="random points of the ball",
            params={"draws": 10},
            norms=(*pixel, "l0"),
            tasks=every,
            needs="labels",
            stochastic=True,
        ),
    ]


@hookimpl
def robplug_norms() -> list[NormSpec]:
    """The pixel norms, and the norm of the rigid motions that two of the libraries look for."""
    return [
        NormSpec(name="linf", make="robplug.norms:LINF", summary="largest absolute change of a value"),
        NormSpec(name="l2", make="robplug.norms:L2", summary="Euclidean length of the change"),
        NormSpec(name="l1", make="robplug.norms:L1", summary="sum of absolute changes"),
        NormSpec(name="l0", make="robplug.norms:L0", summary="number of changed values", unit="values"),
        NormSpec(
            name="rotation-translation",
            make="robplug.adapters.motion:MOTION",
            summary="largest of both shifts and the rotation of an image",
            source="Engstrom et al. 2019",
            unit="pixels; ten degrees count as one",
        ),
    ]


@hookimpl
def robplug_targets() -> list[TargetSpec]:
    """PyTorch modules."""
    return [
        TargetSpec(
            name="robplug/module",
            make="robplug.targets:from_module",
            summary="any nn.Module that gives logits",
            accepts=("torch.nn.modules.module.Module",),
        ),
        TargetSpec(
            name="robplug/list",
            make="robplug.ensembles:of_list",
            summary="several models as one: weights=, fuse=",
            accepts=("builtins.list", "builtins.tuple"),
        ),
        TargetSpec(
            name="robplug/ensemble",
            make="robplug.ensembles:ensemble",
            summary="several targets of a plan as one",
            source="Liu et al. 2017, section 5; Dong et al. 2018, section 3.4",
            params={"weights": None, "fuse": "logits"},
            of="several",
        ),
        TargetSpec(name="robplug/digits-cnn", make="robplug.zoo:digits_cnn", summary="small CNN for digits, untrained"),
        TargetSpec(name="robplug/lenet", make="robplug.zoo:lenet", summary="LeNet-5 for MNIST, untrained"),
        TargetSpec(
            name="robplug/keras-mnist-cnn",
            make="robplug.zoo:keras_mnist_cnn",
            summary="the CNN of Keras' MNIST example, with dropout, untrained",
        ),
        TargetSpec(
            name="robplug/resnet20",
            make="robplug.zoo:resnet20",
            summary="ResNet-20 for CIFAR-10, shortcuts of option A, untrained",
            source="He et al. 2016, section 4.2",
            params={"mean": None, "std": None},
        ),
        TargetSpec(
            name="robplug/vgg11",
            make="robplug.zoo_cifar:vgg11",
            summary="VGG-11 with batch norm for CIFAR, untrained",
            source="Simonyan and Zisserman 2015, table 1",
            params={"classes": 10, "mean": None, "std": None},
        ),
        TargetSpec(
            name="robplug/resnet18",
            make="robplug.zoo_cifar:resnet18",
            summary="ResNet-18 for CIFAR, untrained",
            source="He et al. 2016, table 1",
            params={"classes": 10, "mean": None, "std": None},
        ),
        TargetSpec(
            name="robplug/digits-standard",
            make="robplug.zoo:digits_standard",
            summary="small CNN for digits, trained without defence",
        ),
        TargetSpec(
            name="robplug/digits-at",
            make="robplug.zoo:digits_at",
            summary="small CNN for digits, trained against PGD at linf 0.2",
        ),
    ]


@hookimpl
def robplug_datasets() -> list[DatasetSpec]:
    """The shipped digits, and readers of the user's files."""
    files: dict[str, object] = {"split": "test", "root": None}
    return [
        DatasetSpec(
            name="digits",
            make="robplug.data:digits",
            summary="1,797 grey 8x8 images of digits, shipped",
            source="Alpaydin and Kaynak 1998, UCI Machine Learning Repository",
            params={"split": "test"},
        ),
        DatasetSpec(
            name="mnist",
            make="robplug.data_files:mnist",
            summary="MNIST from its idx files",
            source="LeCun et al. 1998",
            params=files,
        ),
        DatasetSpec(
            name="cifar10",
            make="robplug.data_files:cifar10",
            summary="CIFAR-10 from the files of its binary version",
            source="Krizhevsky 2009",
            params=files,
        ),
        DatasetSpec(
            name="npz",
            make="robplug.data_files:npz",
            summary="a numpy archive with x and y",
            params={**files, "bounds": [0.0, 1.0]},
        ),
        DatasetSpec(
            name="folder", make="robplug.data_files:folder", summary="images in one folder per class", params=files
        ),
    ]


@hookimpl
def robplug_defenses() -> list[DefenseSpec]:
    """Plain and adversarial training."""
    return [
        DefenseSpec(
            name="robplug/none",
            make="robplug.defenses:NoDefense",
            summary="plain training",
            tasks=("classification", "segmentation", "detection"),
        ),
        DefenseSpec(
            name="robplug/crop-flip",
            make="robplug.augmentation:CropFlip",
            summary="random crops and mirror images of the training data",
            source="He et al. 2016, section 4.2",
            params={"padding": 4, "flip": True},
            pieces=("augment",),
        ),
        DefenseSpec(
            name="robplug/at",
            make="robplug.adversarial:AdversarialTraining",
            summary="adversarial training with PGD",
            source="Madry et al. 2018, section 2.1, eq. 2.1",
            params={
                "eps": 8 / 255,
                "norm": "linf",
                "steps": 7,
                "step_size": None,
                "random_start": True,
                "clean_share": 0.0,
                "goal": "untargeted",
                "label_smoothing": 0.0,
                "attack_mode": "eval",
                "patience": None,
            },
            pieces=("objective",),
        ),
    ]
