"""The bricks of the models in Flax Linen. Parameters are float32, carry logical axes and keep T5X's
names.
"""
