"""The control loop on the robot: ticks, chunks, guards, interrupts, recording; ki-run.

Imports: backends, policy, recording, remote, robots; of ki_edge: bundle, files, policy.
"""
