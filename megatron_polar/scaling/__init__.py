"""Arithmetic before a run: hyper-parameter laws, memory of a GPU, and the plan that checks both. No torch."""
