"""The error that ends a run with a message."""


class ExampleError(Exception):
    """A run that cannot go on, with a message for the person who started it."""
