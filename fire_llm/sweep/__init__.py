"""Many runs at once: a grid of recipes, their units shared out among workers that know each other by locks alone."""

from __future__ import annotations

from fire_llm.sweep.running import Sweep, run_sweep

__all__ = ["Sweep", "run_sweep"]
