"""How a run goes: its log, evaluation, trackers and page.

Imports: files, model; of train the seams (batch, training_data).
"""
