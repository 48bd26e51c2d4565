"""T5 folders (T5, T5 1.1, Flan-T5, mT5, ByT5, MADLAD-400)."""
