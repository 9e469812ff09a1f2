"""Orthogonalise and measure matrices: Newton-Schulz, polar factor, singular values, SFE, DfI, ranks, curvature.

`docs/newton-schulz.md` says what each function computes and how precisely.
"""
