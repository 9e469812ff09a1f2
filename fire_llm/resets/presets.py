"""The scopes of the paper's experiments outside of language, by name: what each acts on, with how many steps.

Source: arXiv 2602.08040 and its authors' code. They are for any torch module (`layout="modules"`).
"""

from __future__ import annotations

from typing import Any

_FIRE = {"method": "fire", "iterations": 10}
_ENDS = r"(_proj|_lin|_linear|_layer)?(_proj_weight|\.(linear\.)?weight)$"
QUERY_OR_KEY = rf"(^|[._])(to_|w_?|linear_)?(q|k|query|key){_ENDS}|\[(\d+\.)?[qk]\]$"
"""Names of weights that make queries and keys, in most libraries and as parts of a fused one."""

PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    "paper-resnet": (_FIRE,),
    "paper-vgg": (_FIRE,),
    "paper-vit": ({**_FIRE, "roles": {"query_key": QUERY_OR_KEY}},),
    "paper-dqn": (
        {**_FIRE, "roles": ("conv",)},
        {"method": "full_reset", "roles": ("linear", "linear_bias")},
    ),
    "paper-dqn-shrink-perturb": (
        {"method": "shrink_perturb", "shrink": 0.8, "roles": ("conv", "conv_bias")},
        {"method": "full_reset", "roles": ("linear", "linear_bias")},
    ),
    "paper-simba": ({**_FIRE, "roles": ("linear",)},),
}
"""Resets of each, in order. Every weight of a ResNet and a VGG, the head's too; of a ViT, queries and keys alone; of a
DQN, convolutions projected (or drawn to their initial values), linear layers and their biases at their initial values;
of SimBa, every linear layer, whose biases stay."""
