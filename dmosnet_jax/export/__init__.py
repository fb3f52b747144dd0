"""Weights of other frameworks in, ours out."""
