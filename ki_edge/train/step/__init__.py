"""What one step of a training is: a batch with its draws, the loss, and what a run needs of its data.

Imports: model.
"""
