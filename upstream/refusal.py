"""The one exception that is meant for whoever runs the generator."""


class Refusal(Exception):
    """Printed as one line: what is in the way, and where to mend it."""
