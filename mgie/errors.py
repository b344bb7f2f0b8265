"""Every error that the product raises on purpose.

    MGIEError
    ├── ConfigError              a setting or argument has a value that is not allowed
    ├── PromptError              an instruction or expressive instruction cannot be used
    ├── ImageError               bytes or pixels are not an image that can be edited
    │   ├── ImageTooLargeError   ... because a byte or pixel limit is passed
    │   └── MaskError            a mask cannot be read, or does not fit its image
    ├── BundleError              a bundle is missing, damaged or does not fit its use
    │   └── ConversionError      a published checkpoint cannot become a bundle
    ├── DataError                a data set, ledger or cache is not what it should be
    ├── TrainingError            a training run cannot go on
    ├── RenderError              the diffusion model's output is no picture
    ├── EngineFullError          the engine has no room for another edit; later it may
    ├── DeadlineError            an edit was not done in its time
    ├── ClosedError              what should have done the work was closed before it was done
    ├── EditStoppedError         the caller's own step callback stopped the edit
    └── ParityError              a folder of reference vectors cannot be read

A message names the thing, the value got and the value allowed. Knows nothing of HTTP: `serving`
maps these classes to status codes in one table.
"""


class MGIEError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: One sentence: the thing, the value got, the value allowed.
        param: Name of the argument at fault (`"steps"`), where there is one; callers show it.
    """

    param: str | None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(MGIEError):
    """A setting or argument has a value that is not allowed."""


class PromptError(MGIEError):
    """An instruction or expressive instruction cannot be used (empty, or too long for the model)."""


class ImageError(MGIEError):
    """Bytes or pixels are not an image that can be edited."""


class ImageTooLargeError(ImageError):
    """An image passes the byte or pixel limit."""


class MaskError(ImageError):
    """A mask cannot be read, or does not fit its image."""


class BundleError(MGIEError):
    """A bundle is missing, damaged or does not fit the use it is put to."""


class ConversionError(BundleError):
    """A published checkpoint cannot be turned into a bundle."""


class DataError(MGIEError):
    """A data set, ledger or cache is not what it should be."""


class TrainingError(MGIEError):
    """A training run cannot go on: its losses or gradients are not finite any more."""


class RenderError(MGIEError):
    """The diffusion model's output is no picture: not all of it is finite."""


class EngineFullError(MGIEError):
    """The engine has no room for another edit now.

    Args:
        message: What is wrong, as for every error.
        retry_after_s: Seconds until there may be room, estimated.
    """

    # A default, because exceptions are unpickled by their message alone; the rest follows as state.
    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(MGIEError):
    """An edit was not done in the time it was given."""


class ClosedError(MGIEError):
    """An engine, a batcher or a pool of models was closed before the work was done."""


class ParityError(MGIEError):
    """A folder of reference vectors cannot be read."""


class EditStoppedError(MGIEError):
    """The caller's own step callback stopped the edit by returning False."""
