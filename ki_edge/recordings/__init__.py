"""Recorded episodes and model inputs, read from .npz files and LeRobotDatasets. Imports: files, policy."""
