"""How good a network and its samples are."""
