"""The control loop on the robot: pacing, interrupts, recording; `ki-run`."""
