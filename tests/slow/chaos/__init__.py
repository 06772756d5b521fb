"""Runs on a testbed whose networks, disks and clocks can fail, and the checks afterwards.

``faults`` schedules faults from a seed; ``testbed`` and ``fault_injector`` apply them to real processes; ``observer``
records what the run does; ``replay`` computes the expected result from the chain; ``summary`` prints it.
"""
