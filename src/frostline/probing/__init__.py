"""One distinct op call and a gradient mask to what autograd saves, runs and computes."""
