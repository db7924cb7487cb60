"""How a run goes: its log, evaluation, trackers and page.

Imports: files, model, train.step.
"""
