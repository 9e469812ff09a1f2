"""Measure matrices, the units and features of a network, and the curvature of its loss."""

from __future__ import annotations

from fire_llm.metrics.curvature import TopEigenvalue, gradient_norm, top_hessian_eigenvalue
from fire_llm.metrics.matrices import CHUNK_ELEMENTS, dfi, dfi_of_gram, effective_rank, gram, sfe, srank
from fire_llm.metrics.units import Activity, Features, dormant_scores, dormant_share, feature_srank

__all__ = [
    "CHUNK_ELEMENTS",
    "Activity",
    "Features",
    "TopEigenvalue",
    "dfi",
    "dfi_of_gram",
    "dormant_scores",
    "dormant_share",
    "effective_rank",
    "feature_srank",
    "gradient_norm",
    "gram",
    "sfe",
    "srank",
    "top_hessian_eigenvalue",
]
