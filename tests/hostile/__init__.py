"""Attacks on the commands: bad inputs, damaged folders, kills, signals, full disks. `make hostile` runs them all."""
