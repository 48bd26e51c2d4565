"""Sweeps of runs, and the tables, plots and pages made from their results."""
