"""Networks of scripts/reproduce_vision.py: the paper's, at any width, and an MLP.

Shapes: c = channels, side = height and width of an image, n = classes. Departures from the paper's: the ViT's positions
are cut by `unfold`, and its attention is torch's fused one.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NETWORKS = ("mlp", "vgg", "resnet", "vit")
VGG = {"small": (1, "M", 2, "M", 4, 4, "M", 8, 8, "M"),
       "paper": (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M")}  # fmt: skip
"""Channels of a VGG over its width, M where a feature map is halved: of 6 convolutions, and VGG-16."""


class MLP(nn.Module):
    def __init__(self, c: int, side: int, n: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(c * side**2, width), nn.Linear(width, width), nn.Linear(width, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))

    def hidden(self) -> list[tuple[str, ...]]:
        return [("fc1", "fc2"), ("fc2", "head")]


class VGGNet(nn.Module):
    def __init__(self, c: int, side: int, n: int, width: int, depth: str) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for times in VGG[depth]:
            if isinstance(times, int):
                parts += [nn.Conv2d(c, times * width, 3, padding=1), nn.BatchNorm2d(times * width), nn.ReLU()]
                c = times * width
            elif side > 1:
                parts.append(nn.MaxPool2d(2))
                side //= 2
        self.features, inner = nn.Sequential(*parts), 16 * width
        self.head = nn.Sequential(
            nn.Linear(c * side**2, inner), nn.ReLU(), nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, n)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))

    def hidden(self) -> list[tuple[str, ...]]:
        convolutions = [i for i, part in enumerate(self.features) if isinstance(part, nn.Conv2d)]
        readers = [*(f"features.{i}" for i in convolutions[1:]), "head.0"]
        chain = [(f"features.{i}", f"features.{i + 1}", to) for i, to in zip(convolutions, readers, strict=True)]
        return [*chain, ("head.0", "head.2"), ("head.2", "head.4")]


class Block(nn.Module):
    def __init__(self, c: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and c == out
        wide = () if same else (nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Sequential(*wide)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self, c: int, n: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(c, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*(Block(a, b, 2 if a < b else 1) for a, b in pairs))
        self.head = nn.Sequential(nn.Linear(8 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, n))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    def hidden(self) -> list[tuple[str, ...]]:
        inner = [(f"blocks.{i}.conv1", f"blocks.{i}.bn1", f"blocks.{i}.conv2") for i in range(len(self.blocks))]
        return [*inner, ("head.0", "head.2")]


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out, self.fc1, self.fc2 = (
            nn.Linear(width, width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (to(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, c: int, side: int, n: int, width: int, patch: int, layers: int) -> None:
        super().__init__()
        self.patch, inputs = patch, c * patch**2
        self.embed = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, width), nn.LayerNorm(width))
        self.positions = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.Sequential(*(Layer(width, 3) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x)[:, 0]))

    def hidden(self) -> list[tuple[str, ...]]:
        return [(f"layers.{i}.fc1", f"layers.{i}.fc2") for i in range(len(self.layers))]


def build(network: str, shape: tuple[int, int], n: int, size: str, seed: int) -> Any:
    """Return a network whose weights depend on the seed alone.

    Args:
        network: One of `NETWORKS`.
        shape: c and side.
        n: Classes.
        size: small, an eighth of the paper's width (a sixteenth of the ResNet's, a quarter of the ViT's), or paper.
        seed: Of its initial weights; no other generator is touched.
    """
    (c, side), width = shape, {"small": 8, "paper": 64}[size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if network == "mlp":
            return MLP(c, side, n, 32 * width)
        if network == "vgg":
            return VGGNet(c, side, n, width, size)
        if network == "resnet":
            return ResNet18(c, n, 4 if size == "small" else width)
        patch = max(p for p in range(1, side // 4 + 1) if side % p == 0)
        layers, heads_width = (4, 48) if size == "small" else (12, 192)
        return ViT(c, side, n, heads_width, 4 if size == "paper" else patch, layers)
