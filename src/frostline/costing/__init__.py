"""Trace, subset and method to a Cost: FLOPs, bytes, and how each figure is known."""
