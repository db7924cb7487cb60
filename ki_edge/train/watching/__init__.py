"""How a run goes: evaluation, logs, trackers, its page, estimates of memory."""
