"""Network parts: encoders, projection heads, the dimensional mask."""
