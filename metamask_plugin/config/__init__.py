"""What a user may write: one typed model for each kind of config."""
