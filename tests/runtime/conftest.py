"""The running stack of ``tests/embedded``, for the tests of what both processes share."""

from tests.embedded.conftest import make_stack, running  # noqa: F401 - fixtures
