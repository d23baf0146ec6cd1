"""A simulator of all the records in use; docs/simulate.md says how to use it.

`replay(trace, policy, params)` is all there is to it; traces come from `simulate.files.load_trace`,
or are made with `make_trace`.
"""

from dmctl.simulate.params import Params
from dmctl.simulate.replay import POLICIES, replay
from dmctl.simulate.result import Result
from dmctl.simulate.trace import Request, Trace, make_trace

__all__ = ["POLICIES", "Params", "Request", "Result", "Trace", "make_trace", "replay"]
