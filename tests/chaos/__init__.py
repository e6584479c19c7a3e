"""Faults in real runs: what must come out of them is what an undisturbed run gives."""
