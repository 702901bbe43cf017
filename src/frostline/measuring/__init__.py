"""Really running steps: each subset and method in a fresh process, and what it took."""
