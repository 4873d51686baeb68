"""What goes wrong for a user: one line that names the fix. The CLI prints it and exits with 1."""


class GeodiagError(Exception):
    """A mistake that the person at the keyboard can mend; the message says how."""
