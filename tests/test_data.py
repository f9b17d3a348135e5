"""Data sets against files made here by hand, whole ones and damaged ones."""

from __future__ import annotations

import gzip
import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import robplug
from robplug.data import Dataset
from robplug.errors import InputError
from robplug.registry import resolve

# scikit-learn is only an oracle here


def test_digits_are_those_of_scikit_learn() -> None:
    data = robplug.dataset("digits", split="all")
    source = load_digits()
    assert data.x.dtype == torch.float32 and data.x.shape == (1797, 1, 8, 8)
    assert np.array_equal(data.x[:, 0].numpy() * 16, source.images)
    assert np.array_equal(data.y.numpy(), source.target)


def test_digits_split_is_disjoint_complete_and_stratified() -> None:
    train, test, whole = (robplug.dataset("digits", split=split) for split in ("train", "test", "all"))
    assert (len(train), len(test)) == (1201, 596)
    rows = {tuple(x.flatten().tolist()) for x in whole.x}
    assert rows == {tuple(x.flatten().tolist()) for part in (train, test) for x in part.x}
    share = test.y.bincount().float() / whole.y.bincount()
    assert ((share - 1 / 3).abs() < 0.01).all()
    assert train.digest != test.digest and train.digest == robplug.dataset("digits", split="train").digest


def test_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="train or test or all, got 'val'"):
        robplug.dataset("digits", split="val")


def test_every_dataset_spec_agrees_with_its_function() -> None:
    for spec in robplug.list_datasets():
        assert callable(resolve(spec))


# MNIST


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_mnist(root: Path, images: np.ndarray, labels: np.ndarray, packed: bool = False) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, values in (("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)):
        content = idx(values)
        path = root / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)


LABELS = np.array([3, 1, 4, 1, 5], dtype=np.uint8)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["", "mnist", "MNIST/raw"])
def test_mnist_is_read(tmp_path: Path, images: np.ndarray, packed: bool, below: str) -> None:
    write_mnist(tmp_path / below, images, LABELS, packed)
    data = robplug.dataset("mnist", root=str(tmp_path))
    assert data.x.dtype == torch.float32 and data.x.shape == (5, 1, 28, 28) and data.bounds == (0.0, 1.0)
    assert np.array_equal(data.x[:, 0].numpy(), images.astype(np.float32) / np.float32(255))
    assert data.y.dtype == torch.int64 and data.y.tolist() == LABELS.tolist()


def test_root_may_come_from_the_environment(
    tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path, images, LABELS)
    monkeypatch.setenv("ROBPLUG_DATA", str(tmp_path))
    assert len(robplug.dataset("mnist")) == 5
    monkeypatch.delenv("ROBPLUG_DATA")
    with pytest.raises(InputError, match=r"ROBPLUG_DATA; the MNIST page of Yann LeCun"):
        robplug.dataset("mnist")


def damaged(content: bytes, how: str) -> bytes:
    return {
        "magic": bytes([0, 0, 9, 3]) + content[4:],
        "truncated": content[:-1],
        "longer": content + b"\0",
        "header": content[:6],
        "empty": b"",
    }[how]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("magic", "magic number 00000803 at the start of .*, got 00000903"),
        ("truncated", r"3936 bytes for shape \(5, 28, 28\) in .*, got 3935"),
        ("longer", r"3936 bytes .*, got 3937"),
        ("header", "got 6"),
        ("empty", "got an empty file"),
    ],
)
def test_damaged_idx_is_refused(tmp_path: Path, images: np.ndarray, how: str, says: str) -> None:
    write_mnist(tmp_path, images, LABELS)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(InputError, match=says) as caught:
        robplug.dataset("mnist", root=str(tmp_path))
    assert str(path) in str(caught.value) and "Yann LeCun" in str(caught.value)


@pytest.mark.parametrize("size", [10, 200])
def test_damaged_gzip_is_refused(tmp_path: Path, images: np.ndarray, size: int) -> None:
    write_mnist(tmp_path, images, LABELS, packed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"a whole gzip or plain file .*t10k-images-idx3-ubyte.gz"):
        robplug.dataset("mnist", root=str(tmp_path))


def test_mnist_files_that_do_not_belong_together_are_refused(tmp_path: Path, images: np.ndarray) -> None:
    write_mnist(tmp_path, images, LABELS[:4])
    with pytest.raises(InputError, match=r"5 labels in .*, got 4"):
        robplug.dataset("mnist", root=str(tmp_path))
    write_mnist(tmp_path, images, LABELS + np.uint8(7))
    with pytest.raises(InputError, match=r"labels 0 to 9 in .*, got 12"):
        robplug.dataset("mnist", root=str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"the file .*t10k-labels-idx1-ubyte, got no such file; the MNIST page"):
        robplug.dataset("mnist", root=str(tmp_path))


def test_missing_folder_and_missing_file_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cifar10 in .*nowhere, got no such file or folder; the CIFAR-10 page"):
        robplug.dataset("cifar10", root=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"data_batch_1.bin in one of .*cifar-10-batches-bin, got none; the CIFAR-10"):
        robplug.dataset("cifar10", split="train", root=str(tmp_path))


# CIFAR-10


def record(label: int, red: int, green: int, blue: int) -> bytes:
    return bytes([label]) + bytes([red]) * 1024 + bytes([green]) * 1024 + bytes([blue]) * 1024


def test_cifar10_is_read(tmp_path: Path) -> None:
    first = bytearray(record(7, 10, 20, 30))
    first[1 + 1024 + 33] = 255  # green, second row, second column
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "test_batch.bin").write_bytes(bytes(first) + record(2, 0, 128, 255))
    data = robplug.dataset("cifar10", root=str(tmp_path))
    assert data.x.shape == (2, 3, 32, 32) and data.y.tolist() == [7, 2]
    assert torch.equal(data.x[1, :, 0, 0] * 255, torch.tensor([0.0, 128.0, 255.0]))
    assert data.x[0, 1, 1, 1] == 1.0 and (data.x[0, 1] == 1.0).sum() == 1
    assert data.class_names[data.y[0]] == "horse"


def test_cifar10_joins_the_training_files_in_order(tmp_path: Path) -> None:
    for k in range(1, 6):
        (tmp_path / f"data_batch_{k}.bin").write_bytes(record(k, 0, 0, 0))
    assert robplug.dataset("cifar10", split="train", root=str(tmp_path)).y.tolist() == [1, 2, 3, 4, 5]
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(InputError, match=r"the file .*data_batch_4.bin, got no such file"):
        robplug.dataset("cifar10", split="train", root=str(tmp_path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (record(1, 0, 0, 0)[:-1], r"a multiple of 3073 bytes in .*test_batch.bin \(30730000 as published\), got 3072"),
        (b"", "a multiple of 3073 bytes .*, got 0"),
        (record(10, 0, 0, 0), "labels 0 to 9 in .*, got 10"),
    ],
)
def test_damaged_cifar10_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(InputError, match=says):
        robplug.dataset("cifar10", root=str(tmp_path))


# npz


def test_npz_is_read_from_a_file_and_from_a_folder(tmp_path: Path) -> None:
    x, y = np.linspace(-1, 1, 24).reshape(4, 2, 3), np.array([0, 1, 2, 1], dtype=np.int32)
    np.savez(tmp_path / "test.npz", x=x, y=y)
    for root in (tmp_path, tmp_path / "test.npz"):
        data = robplug.dataset("npz", root=str(root), bounds=[-1, 1])
        assert data.x.dtype == torch.float32 and data.y.dtype == torch.int64 and data.bounds == (-1.0, 1.0)
        assert np.array_equal(data.x.numpy(), x.astype(np.float32)) and data.y.tolist() == [0, 1, 2, 1]


GOOD_X, GOOD_Y = np.zeros((2, 3)), np.array([0, 1])


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": GOOD_X + 2, "y": GOOD_Y}, r"x inside the bounds \(0.0, 1.0\) in .*, got values from 2 to 2; scale x"),
        ({"x": GOOD_X * np.nan, "y": GOOD_Y}, "got values from nan to nan"),
        ({"x": GOOD_X, "y": GOOD_Y[:1]}, r"y of shape \(2,\) and whole numbers"),
        ({"x": GOOD_X, "y": GOOD_Y * 1.0}, "whole numbers in .*float64"),
        ({"x": GOOD_X, "y": GOOD_Y - 1}, "labels y >= 0 in .*, got -1"),
        ({"x": GOOD_X[0, :2], "y": GOOD_Y}, r"x of shape \(N, \.\.\.\)"),
        ({"x": GOOD_X.astype(bool), "y": GOOD_Y}, "numbers in .* bool"),
        ({"x": GOOD_X}, "arrays x and y in .*, got an archive without"),
        ({"x": np.array([{}, {}], dtype=object), "y": GOOD_Y}, "a numpy archive .*pickled objects are not loaded"),
    ],
)
def test_unfit_npz_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], says: str) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=says) as caught:
        robplug.dataset("npz", root=str(path))
    assert str(path) in str(caught.value)


def test_truncated_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, x=GOOD_X, y=GOOD_Y)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"a numpy archive .*mine.npz"):
        robplug.dataset("npz", root=str(path))
    np.save(tmp_path / "one.npy", GOOD_X)
    with pytest.raises(InputError, match=r"a numpy archive .*one.npy"):
        robplug.dataset("npz", root=str(tmp_path / "one.npy"))


# folder


def write_images(root: Path, mode: str = "RGB") -> dict[str, np.ndarray]:
    shape = (4, 6, 3) if mode == "RGB" else (4, 6)
    rng = np.random.default_rng(1)
    arrays = {name: rng.integers(0, 256, shape, dtype=np.uint8) for name in ("cat/b.png", "ape/a.png", "cat/a.png")}
    for name, array in arrays.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    (root / "cat" / ".hidden").write_text("")
    return arrays


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_folder_is_read(tmp_path: Path, mode: str) -> None:
    arrays = write_images(tmp_path / "test", mode)
    data = robplug.dataset("folder", root=str(tmp_path))
    assert data.class_names == ("ape", "cat") and data.y.tolist() == [0, 1, 1]
    assert data.x.shape == (3, 3 if mode == "RGB" else 1, 4, 6)
    second = data.x[1].permute(1, 2, 0).squeeze(-1).mul(255).round().to(torch.uint8).numpy()
    assert np.array_equal(second, arrays["cat/a.png"])
    assert robplug.dataset("folder", split="all", root=str(tmp_path / "test")).digest == data.digest


def test_unfit_folder_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path)
    with pytest.raises(InputError, match=r"folders of images in .*test, got none; .* split='all'"):
        robplug.dataset("folder", root=str(tmp_path))
    extra = tmp_path / "cat" / "z.png"
    for image, says in (
        (Image.new("RGB", (6, 5)), r"z.png of \(height, width, channels\) \(4, 6, 3\) .* got \(5, 6, 3\)"),
        (Image.new("L", (6, 4)), r"got \(4, 6, 1\); resize the images to one size and one mode"),
        (Image.new("RGBA", (6, 4)), "grey .* or RGB image in .*z.png, got mode RGBA"),
    ):
        image.save(extra)
        with pytest.raises(InputError, match=says):
            robplug.dataset("folder", split="all", root=str(tmp_path))
    extra.write_bytes(extra.read_bytes()[:20])
    with pytest.raises(InputError, match=r"a whole image in .*z.png"):
        robplug.dataset("folder", split="all", root=str(tmp_path))
    extra.rename(tmp_path / "cat" / "notes.txt")
    with pytest.raises(InputError, match=r"an image .*, got .*notes.txt; move other files out"):
        robplug.dataset("folder", split="all", root=str(tmp_path))


# further tasks


def two_tasks() -> Dataset:
    x, y = torch.rand(3, 1, 2, 2), torch.zeros(3, 2, 2, dtype=torch.int64)
    boxes = torch.arange(15.0).view(3, 1, 5)
    return Dataset("both", x, y, task="segmentation", others={"detection": boxes})


def test_labels_of_further_tasks_go_with_their_samples() -> None:
    data = two_tasks()
    assert torch.equal(data.head(2).labels("detection"), data.labels("detection")[:2])
    rows = torch.tensor([2, 0])
    assert torch.equal(data.take(rows).labels("detection"), data.labels("detection")[rows])
    assert torch.equal(data.labels("segmentation"), data.y)
    with pytest.raises(InputError, match="both with labels for classification, got labels for segmentation, detection"):
        data.labels("classification")


def test_the_digest_sees_task_and_further_labels_and_is_otherwise_what_it_was() -> None:
    data = two_tasks()
    changed = data.labels("detection").clone()
    changed[0, 0, 0] += 1
    plain = replace(data, task="classification", others={})
    others = [plain, replace(data, others={}), replace(data, others={"detection": changed})]
    assert len({data.digest, *(other.digest for other in others)}) == 4
    content = hashlib.sha256(str((tuple(data.x.shape), data.bounds)).encode())
    content.update(data.x.numpy().tobytes() + data.y.numpy().tobytes())
    assert plain.digest == content.hexdigest()
