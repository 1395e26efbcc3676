"""What TD does and what it costs, on problems with a known answer."""
