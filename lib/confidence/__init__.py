"""How good a mask is without the truth: evidence, and what it proved to be worth."""
