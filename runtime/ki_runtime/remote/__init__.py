"""A policy on another machine, behind openpi's websocket protocol. Its packages are imported when one is opened.

Imports: policy; of ki_edge: policy.
"""
