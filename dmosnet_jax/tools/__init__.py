"""Commands that run others: several experiments and what comes of them."""
