"""MONAI Label's client imports `cgi`, which Python 3.11 and 3.12 warn of: once, here."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import monailabel.client  # noqa: F401
