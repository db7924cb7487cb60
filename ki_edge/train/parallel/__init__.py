"""Training on the devices there are: processes, sharding, precision, optimisers, averages, adapters, state on disk.

Imports: model, train's own batches, objective and settings.
"""
