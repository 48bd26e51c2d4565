"""A folder of Hugging Face, or an endpoint that serves it, against the checkpoint that it was
written from: what it states, its tensors, and what others compute from it, layer by layer.
"""
