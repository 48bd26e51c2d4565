"""Folders of vision transformers: ViT, DINOv2, and the vision towers of CLIP and SigLIP."""
