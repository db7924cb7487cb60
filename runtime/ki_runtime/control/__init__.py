"""The control loop on the robot: pacing, guards, interrupts, recording; ki-run.

Imports: backends, policy, robots; of ki_edge: files, policy.
"""
