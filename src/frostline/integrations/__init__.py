"""Other libraries; each file imports its library only when called."""
