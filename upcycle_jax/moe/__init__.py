"""Mixture-of-Experts layers: capacity, routing, dispatch, losses, and the layer that joins them."""
