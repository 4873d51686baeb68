"""Errors that a user can fix. The CLI prints the message and exits with code 1."""


class GeodiagError(Exception):
    """A mistake that the user can fix; the message is one line that names the fix."""
