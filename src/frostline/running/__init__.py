"""Training a subset: what is frozen stays as it is, and what is trained costs what was asked for."""
