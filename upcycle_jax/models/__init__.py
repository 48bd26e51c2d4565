"""Architectures assembled from bricks, and the model API that training, surgery and evaluation
use.
"""
