"""Training on the devices there are: processes, sharding, precision, optimisers, averages, adapters, state on disk.

Imports: checkpoints, checkpoints.layout, checkpoints.peft, files, model, planning, train.step.
"""
