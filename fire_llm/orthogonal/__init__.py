"""Orthogonalise matrices: the paper's Newton-Schulz map, the true polar factor, and singular values.

`docs/newton-schulz.md` says what each function really computes and how precisely.
"""

from __future__ import annotations

from fire_llm.orthogonal.paper_map import CUBIC, newton_schulz, newton_schulz_factor
from fire_llm.orthogonal.products import CHUNK_ELEMENTS, CPU_BATCH_SIDE, exact_products, settings_kept
from fire_llm.orthogonal.projection import COMPOSITION, polar
from fire_llm.orthogonal.spectrum import singular_range, singular_values

__all__ = [
    "CHUNK_ELEMENTS",
    "COMPOSITION",
    "CPU_BATCH_SIDE",
    "CUBIC",
    "exact_products",
    "newton_schulz",
    "newton_schulz_factor",
    "polar",
    "settings_kept",
    "singular_range",
    "singular_values",
]
