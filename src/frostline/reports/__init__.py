"""Costs as text, JSON and HTML: three views of the same figures."""
