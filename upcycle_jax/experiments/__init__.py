"""Timing of single layers and steps, for the benchmark scripts."""
