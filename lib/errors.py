"""RefSeg's errors: each message says what is wrong, the value, what is allowed, the next step."""


class RefSegError(Exception):
    """Base of all errors that a user can cause and mend."""


class ImageError(RefSegError, ValueError):
    """An image file cannot be read as a 2D image or one 3D volume of finite numbers."""


class LabelError(RefSegError, ValueError):
    """A label map does not fit its image, or its values are not label numbers."""


class MemoryStoreError(RefSegError):
    """The bank's folder cannot be used (other fingerprint, unreadable, locked for too long)."""


class WeightsError(RefSegError, LookupError):
    """Weights are absent or damaged; the message carries the command that mends it."""


class RequestError(RefSegError, ValueError):
    """A request's option is unknown or out of range."""


class ModelStoreError(RefSegError):
    """A site's model cannot be stored, found or read."""


class NoModelError(ModelStoreError):
    """A site has not trained any model yet."""


class TrainingError(RefSegError, ValueError):
    """Training cannot start or go on with these labels or on this machine."""


class PacsError(RefSegError):
    """The DICOMweb server does not answer, or does not do what it was asked."""
