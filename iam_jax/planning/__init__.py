"""Plans: a run compiled for devices that are not attached, with its memory, FLOPs, traffic, time and cost."""
