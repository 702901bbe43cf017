"""A trace, an importance and a budget -> the best subset."""
