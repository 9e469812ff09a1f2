"""Resets: what happens to the weights between two phases.

A reset is a function of one tensor (and of that tensor at step 0): tensor in, tensor out. Where the tensors live — in
a running `Trainer`, in a checkpoint on disk, on another rank — is the business of whoever calls it, so the same
function serves them all. Its signature is its schema: the keyword-only arguments are the options a recipe may give.
What acts during a phase instead (`penalties`, `recycling`) is in the same registry, and a trainer's callback runs it.
"""

from __future__ import annotations

from fire_llm.architectures.grammar import ROLES
from fire_llm.resets.apply import apply_reset, fire_
from fire_llm.resets.hidden_units import Recycling
from fire_llm.resets.injection import PlasticityInjection, inject_plasticity_
from fire_llm.resets.methods import FORMER, RESETS, ResetMethod, register_reset, register_training
from fire_llm.resets.penalizing import Penalties
from fire_llm.resets.penalties import l2_init, parseval
from fire_llm.resets.recycling import ContinualBackprop, ReDo, SelfNormalizedResets
from fire_llm.resets.report import SIGMA_QUANTILES, ResetReport, TensorReport, sigma_quantiles
from fire_llm.resets.spec import ResetsLike, ResetSpec, parse_resets

__all__ = [
    "FORMER",
    "RESETS",
    "ROLES",
    "SIGMA_QUANTILES",
    "ContinualBackprop",
    "Penalties",
    "PlasticityInjection",
    "ReDo",
    "Recycling",
    "ResetMethod",
    "ResetReport",
    "ResetSpec",
    "ResetsLike",
    "SelfNormalizedResets",
    "TensorReport",
    "apply_reset",
    "fire_",
    "inject_plasticity_",
    "l2_init",
    "parse_resets",
    "parseval",
    "register_reset",
    "register_training",
    "sigma_quantiles",
]
