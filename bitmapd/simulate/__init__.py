"""A simulator of all the records in use; docs/simulate.md says how to use it.

`replay(trace, policy, params)` is all there is to it; traces come from `simulate.files.load_trace`,
or are made with `make_trace`.
"""

from bitmapd.simulate.params import Params
from bitmapd.simulate.replay import POLICIES, replay
from bitmapd.simulate.result import Result
from bitmapd.simulate.trace import Request, Trace, make_trace

__all__ = ["POLICIES", "Params", "Request", "Result", "Trace", "make_trace", "replay"]
