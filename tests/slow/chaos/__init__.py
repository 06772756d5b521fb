"""A run in a world of its own that can be disturbed: namespaces, small disks, clocks; and what has to hold after it.

``faults`` says what happens when, from a seed alone; ``world`` does it to real processes; ``watch`` sees what the run
makes of it; ``replay`` computes from the chain what must have come of it; ``summary`` prints it.
"""
