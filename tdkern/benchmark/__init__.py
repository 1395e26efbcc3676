"""What a training step costs on a network of one's own: `tdkern bench`."""
