"""The prediction policies by the names under which administrators know them (pure)."""

from __future__ import annotations

from collections.abc import Callable

from bitmapd.errors import UsageError
from bitmapd.predict.lru import LruPolicy
from bitmapd.predict.policy import Policy
from bitmapd.predict.superset import SupersetPolicy
from bitmapd.record.geometry import Geometry

PolicyFactory = Callable[[Geometry], Policy]

PREDICTORS: dict[str, PolicyFactory] = {"superset": SupersetPolicy, "lru": LruPolicy}
DEFAULT_PREDICTOR = "superset"


def make_policy(name: str, geometry: Geometry) -> Policy:
    """A new policy for a volume; `UsageError` for a name that is not known."""
    factory = PREDICTORS.get(name)
    if factory is None:
        known = ", ".join(sorted(PREDICTORS))
        from difflib import get_close_matches  # noqa: PLC0415  (0.2 MiB, for mistakes alone)

        near = get_close_matches(name, PREDICTORS, 1)
        raise UsageError(
            f"predictor '{name}' is not known",
            hint=f"did you mean '{near[0]}'? known are: {known}" if near else f"known are: {known}",
        )
    return factory(geometry)
