"""Trace + subsets + a memory limit -> Fit: the largest batch and sequence length, found without running."""
