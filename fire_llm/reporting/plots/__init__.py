"""Figures of the report: plain numbers in, plotly figures out as JSON-ready dicts."""
