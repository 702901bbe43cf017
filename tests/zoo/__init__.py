"""The models of ``tests/cases.py``, one kind a file."""
