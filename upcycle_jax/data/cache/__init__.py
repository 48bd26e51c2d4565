"""Tasks as tokenised examples on disk: written by SeqIO once, read without it and TensorFlow."""
