"""What users type: thin entry points behind ``main_*.py``."""
