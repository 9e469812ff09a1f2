"""Continual pretraining on the Hugging Face stack, with FIRE and the resets it must be compared with.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "newton_schulz": "linalg.newton_schulz",
    "polar": "linalg.polar",
    "sfe": "linalg.measures",
    "dfi": "linalg.measures",
    "logical_matrices": "architectures.matrices",
    "module_matrices": "architectures.modules",
    "register_layout": "architectures.matrices",
    "fire_": "resets",
    "apply_reset": "resets",
    "Penalties": "resets",
    "Recycling": "resets",
    "PlasticityInjection": "resets",
    "inject_plasticity_": "resets",
    "register_reset": "resets",
    "register_training": "resets",
    "reset_checkpoint": "checkpoint",
    "perplexity": "evaluation",
    "paired_difference": "evaluation",
    "diagnose": "evaluation.diagnose",
    "diagnose_module": "evaluation.diagnose_module",
    "ContinualArguments": "training",
    "ContinualTrainer": "training",
    "EvaluationSet": "training",
    "DiagnosticsCallback": "training",
    "PenaltyCallback": "training",
    "RecyclingCallback": "training",
    "ResetCallback": "training",
    "Recipe": "experiment.recipe",
    "load_recipe": "experiment.recipe",
    "run_recipe": "experiment.run",
    "UserError": "core.errors",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fire_llm' has no attribute '{name}'")
    return getattr(importlib.import_module(f"fire_llm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
