"""Capacity analysis: formulas, divergence, cuts, coverage, and the report."""
