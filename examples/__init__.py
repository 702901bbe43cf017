"""Networks to cost. Each function is a TARGET of ``frostline cost``: ``examples/small.py:middle_layer``."""
