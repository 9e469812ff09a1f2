"""Real images for scripts/reproduce_vision.py, from a folder or from a package; nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fire_llm.core.errors import UserError

PACKAGED = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""


@dataclass(frozen=True)
class Images:
    """Training and test images, (N, c, side, side) fp32 of mean 0 and deviation 1 over the training images."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1

    @property
    def digest(self) -> str:
        tensors = (self.x, self.y, self.test_x, self.test_y)
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:16]


def load(folder: Path | None) -> Images:
    """Read a data set by what its folder holds; without a folder, Fashion-MNIST of Debian, or scikit-learn's digits.

    Raises:
        UserError: The folder holds none that is known.
    """
    if folder is None:
        return _idx(PACKAGED) if PACKAGED.is_dir() else _digits()
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder")
    if any(folder.glob("train-images*")):
        return _idx(folder)
    for below in (folder, *(p for p in folder.iterdir() if p.is_dir())):
        if (below / "data_batch_1.bin").exists():
            return _cifar("CIFAR-10", below, [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", 1)
        if (below / "train.bin").exists():
            return _cifar("CIFAR-100", below, ["train.bin"], "test.bin", 2)
        if (below / "wnids.txt").exists():
            return _tiny_imagenet(below)
        if (below / "data_batch_1").exists() or (below / "meta").exists():
            raise UserError(f"--data {folder}: CIFAR as pickles, which can run code: give its binary version (*.bin)")
    raise UserError(
        f"--data {folder}: none of train-images-idx3-ubyte[.gz] (the MNIST family), data_batch_1.bin (CIFAR-10), "
        "train.bin (CIFAR-100), wnids.txt (Tiny-ImageNet) is in it"
    )


def _images(name: str, x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> Images:
    """Return images of bytes (N, c, side, side) as numbers."""
    mean, deviation = float(x.mean()), float(x.std())
    parts = [torch.from_numpy((a.astype(np.float32) - mean) / deviation) for a in (x, test_x)]
    labels = [torch.from_numpy(a.astype(np.int64)) for a in (y, test_y)]
    return Images(name, parts[0], labels[0], parts[1], labels[1])


def _idx(folder: Path) -> Images:
    def read(stem: str) -> np.ndarray:
        found = sorted(folder.glob(f"{stem}*"))
        if not found:
            raise UserError(f"--data {folder}: {stem}-ubyte[.gz] is missing")
        raw = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
        shape = np.frombuffer(raw, ">u4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape.astype(int))

    stems = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    x, y, test_x, test_y = map(read, stems)
    return _images(folder.resolve().name, x[:, None], y, test_x[:, None], test_y)


def _cifar(name: str, folder: Path, train: list[str], test: str, labels: int) -> Images:
    def read(files: list[str]) -> tuple[np.ndarray, np.ndarray]:
        raw = np.concatenate([np.frombuffer((folder / f).read_bytes(), np.uint8) for f in files])
        rows = raw.reshape(-1, labels + 3 * 32 * 32)
        return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1]

    return _images(name, *read(train), *read([test]))


def _tiny_imagenet(folder: Path) -> Images:
    from PIL import Image

    names = {wnid: i for i, wnid in enumerate((folder / "wnids.txt").read_text().split())}
    train = [(file, names[file.parts[-3]]) for file in sorted(folder.glob("train/*/images/*.JPEG"))]
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    held = [(folder / "val" / "images" / row[0], names[row[1]]) for row in (line.split("\t") for line in lines)]

    def read(files: list[tuple[Path, int]]) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in files])
        return pixels.transpose(0, 3, 1, 2), np.array([label for _, label in files])

    return _images("Tiny-ImageNet", *read(train), *read(held))


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "no images: give --data FOLDER, install Debian's dataset-fashion-mnist, or scikit-learn for its digits"
        ) from None
    found = load_digits()
    x, y = found.images[:, None], found.target
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1297], order[1297:]
    return _images("digits", x[train], y[train], x[test], y[test])
