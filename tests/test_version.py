"""The version stands in one place."""

from importlib.metadata import version

import wrapq
from wrapq.version import __version__


def test_the_package_says_the_version_that_is_installed():
    assert wrapq.__version__ == __version__ == version("wrapq")
