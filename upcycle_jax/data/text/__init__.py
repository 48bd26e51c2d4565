"""A user's own text: files, documents and their division into splits, vocabularies. No
TensorFlow.
"""
