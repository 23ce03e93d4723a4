"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# No deadline: on shared cores the first example of a test may take any time. The same examples in every run, so that a
# failure is found again.
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")
