"""Runs and sweeps: the units of one recipe, or of a grid of them, shared out among workers by locks alone."""

from __future__ import annotations

from fire_llm.sweep.running import Sweep, run_recipe, run_sweep

__all__ = ["Sweep", "run_recipe", "run_sweep"]
