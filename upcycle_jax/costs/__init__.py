"""What training a model costs, counted from its program: FLOPs, activations, all-to-alls, bytes of
parameters; and what accelerators can do.
"""
