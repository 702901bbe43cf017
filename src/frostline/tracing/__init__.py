"""Model and inputs to a Trace: the tape of one step, joined with autograd's graph."""
