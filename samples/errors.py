"""The one error for data that cannot be used as given."""


class DataError(ValueError):
    """A sample, file or vocabulary is wrong. The text names what, where, and the option to change."""
