"""Everything that patchreg raises on purpose.

Each class is also a built-in exception, so that callers may catch either. The command line turns any of them into one
sentence on stderr and exit status 2.
"""


class PatchregError(Exception):
    """Base of all errors that patchreg raises on purpose."""


class InputError(PatchregError, ValueError):
    """A file, an argument or a setting that cannot be used as given."""


class GeometryError(InputError):
    """An affine or a grid that describes no place in the world."""


class GridMismatch(InputError):
    """Two things that must share a grid do not."""


class ModelNotFound(InputError):
    """No model of that name or in that folder."""


class OutputError(PatchregError, OSError):
    """A result that could not be written."""


class BackendUnavailable(PatchregError, RuntimeError):
    """A backend that was asked for by name cannot run here."""


class NoGradient(PatchregError, RuntimeError):
    """A gradient was asked for where none exists."""


class UnsupportedSharding(PatchregError, RuntimeError):
    """A layer that cannot run on slabs of a volume."""


class RankLost(PatchregError, RuntimeError):
    """Another process of a training failed, died or did not answer."""
