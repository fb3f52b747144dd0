"""What a network is worth: extraction, ranking, re-ranking, report."""
