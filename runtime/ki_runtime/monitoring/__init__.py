"""What a policy server does, to be read by people and by machines: metrics, a page, a log, recordings.

The server tells what happened (`events.py`), and can do without any of this.
Imports: recording; of ki_edge: files, policy.
"""
