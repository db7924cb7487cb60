"""The control loop on the robot: pacing, interrupts, recording; ki-run.

Imports: backends, policy, robots; of ki_edge: policy.
"""
