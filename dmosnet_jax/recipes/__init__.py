"""Whole runs: each recipe only connects what the rooms below it provide."""
