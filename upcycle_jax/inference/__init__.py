"""Decoding algorithms, predictions and scores over tasks, and the metrics that tasks make of
them.
"""
