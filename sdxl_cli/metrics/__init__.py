"""How good pictures are, in numbers: formulas, the networks some of them need, and where those have their weights."""
