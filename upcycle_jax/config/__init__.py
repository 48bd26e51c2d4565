"""Configuration: the only room that imports gin. It finds, parses, checks and resolves gin files into plain objects."""
