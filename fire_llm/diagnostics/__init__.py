"""Measure how plastic a causal LM still is, on a text: rank of its features, dormant units, curvature, DfI, SFE."""

from __future__ import annotations

from fire_llm.diagnostics.diagnose import LOG_PREFIX, Diagnostics, diagnose

__all__ = ["LOG_PREFIX", "Diagnostics", "diagnose"]
