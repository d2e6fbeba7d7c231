"""How many inputs each test of this folder draws.

python -m pytest tests/fuzz                               some hundred each, the same each time: CI's
python -m pytest tests/fuzz --hypothesis-profile long     a hundred thousand each, other ones each time
"""

from typing import Any

from hypothesis import HealthCheck, settings

_ALWAYS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}

settings.register_profile("ci", max_examples=300, derandomize=True, database=None, **_ALWAYS)
settings.register_profile("long", max_examples=100_000, print_blob=True, **_ALWAYS)
settings.load_profile("ci")
