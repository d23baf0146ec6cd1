"""Replaying a trace against a policy: the one function of the simulator (pure).

    result = replay(trace, "superset", Params(record_limit_bytes=256 << 20))

A policy is a name of `POLICIES`, `drbd-al:SLOTS` or `drbd-pmem:SLOTS` for an activity log of a
given size, `predictor:NAME` for any predictor that a volume may be given, or a function from a
geometry to a new `bitmapd.predict.policy.Policy`.  The same trace, policy and params give the same
result, always.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from difflib import get_close_matches

from bitmapd.errors import UsageError
from bitmapd.predict.predictors import PolicyFactory, make_policy
from dmctl.simulate.dm import Era, MirrorLog
from dmctl.simulate.drbd import EXTENT_BYTES, ActivityLog, PmemLog
from dmctl.simulate.eras import plan_eras
from dmctl.simulate.llbitmap import LocklessBitmap
from dmctl.simulate.md import IntentBitmap
from dmctl.simulate.meter import hit_rate
from dmctl.simulate.model import Model
from dmctl.simulate.paging import Belady, Lru
from dmctl.simulate.params import Params
from dmctl.simulate.result import Result
from dmctl.simulate.superset import GateModel
from dmctl.simulate.trace import Trace

OURS = "superset"
LOGS: dict[str, type[ActivityLog]] = {"drbd-al": ActivityLog, "drbd-pmem": PmemLog}
PREDICTOR = "predictor:"
IDLE_S = 3600.0
IDLE_STEPS = 60

_MODELS: dict[str, Callable[[Trace, Params], Model]] = {
    "md-bitmap": IntentBitmap,
    "md-llbitmap": LocklessBitmap,
    "dm-mirror": MirrorLog,
    "dm-era": lambda trace, params: Era(trace, params, plan_eras(trace, params)),
    "lru": Lru,
    "belady": Belady,
}
POLICIES = (OURS, *LOGS, *_MODELS)

PolicyLike = str | PolicyFactory


def make_model(trace: Trace, policy: PolicyLike, params: Params) -> Model:
    """`UsageError` if there is no such policy."""
    if not isinstance(policy, str):
        return _gate_model(trace, policy, params)
    if policy == OURS or policy.startswith(PREDICTOR):
        name = policy.removeprefix(PREDICTOR)
        return _gate_model(trace, lambda geometry: make_policy(name, geometry), params)
    name, colon, slots = policy.partition(":")
    if name in LOGS:
        if not colon:
            return LOGS[name](trace, params, params.units(EXTENT_BYTES))
        if not slots.isascii() or not slots.isdigit() or not int(slots):
            raise UsageError(f"policy '{policy}': '{slots}' is not a number of slots")
        return LOGS[name](trace, params, int(slots))
    if policy not in _MODELS:
        near = get_close_matches(policy, POLICIES, 1)
        known = f"known are: {', '.join(POLICIES)}, drbd-al:SLOTS, predictor:NAME"
        hint = f"did you mean '{near[0]}'? {known}" if near else known
        raise UsageError(f"policy '{policy}' is not known", hint=hint)
    return _MODELS[policy](trace, params)


def _gate_model(trace: Trace, factory: PolicyFactory, params: Params) -> GateModel:
    made = factory(params.geometry(trace.size_bytes))
    limit = params.units(params.extent_bytes)
    return GateModel(trace, params, plan_eras(trace, params), made, limit)


def drive(trace: Trace, model: Model) -> None:
    """Let the model see the whole trace."""
    times, first, count = trace.time_s, 0, len(trace)
    while first < count:
        model.elapse(times[first])
        stop = bisect_left(times, model.due_s, first)
        model.run(first, stop)
        first = stop


def replay(trace: Trace, policy: PolicyLike, params: Params | None = None) -> Result:
    """See the module docstring."""
    params = params or Params()
    model = make_model(trace, policy, params)
    drive(trace, model)
    meter, unit = model.meter, model.unit_bytes
    end_s = trace.end_s
    meter.stored.hold(end_s)
    meter.record.hold(end_s)
    waited = len(meter.waits)
    figures = (meter.stored.mean(), meter.stored.quantile(0.99), meter.stored.highest)
    mean_record = meter.record.mean()
    return Result(
        trace=trace.name,
        policy=policy if isinstance(policy, str) else _name_of(model),
        extent_size_bytes=unit,
        record_limit_bytes=(
            params.record_limit_bytes if model.limit_units is None else model.limit_units * unit
        ),
        limited=model.limit_units is not None,
        queue_depth=params.queue_depth,
        requests=trace.requests,
        writes=len(trace),
        hits=len(trace) - waited,
        waited_writes=waited,
        waited_updates=meter.waited_updates,
        record_writes=meter.record_writes,
        record_flushes=meter.record_flushes,
        record_written_bytes=meter.record_written_bytes,
        mean_wait_s=meter.wait_s / waited if waited else 0.0,
        longest_wait_s=meter.longest_wait_s,
        stalls=meter.stalls,
        stall_s=meter.stall_s,
        mean_record_bytes=mean_record * unit,
        mean_resync_bytes=figures[0] * unit,
        p99_resync_bytes=figures[1] * unit,
        max_resync_bytes=figures[2] * unit,
        idle_resync_bytes=_after_idling(model, end_s) * unit,
        mean_dirty_bytes=plan_eras(trace, params).mean_dirty_bytes,
        violations=meter.violations,
        hit_rate=hit_rate(trace, meter.waits),
    )


def _name_of(model: Model) -> str:
    return model.policy.name if isinstance(model, GateModel) else ""


def _after_idling(model: Model, end_s: float) -> int:
    """Units that are stored an hour after the last write."""
    for step in range(1, IDLE_STEPS + 1):
        model.elapse(end_s + step * IDLE_S / IDLE_STEPS)
        if not model.meter.stored.value:
            break  # without writes it stays so
    return model.meter.stored.value
