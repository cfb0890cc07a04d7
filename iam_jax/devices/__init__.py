"""Devices and processes: the mesh and sharding, peak performance of chips, TPU topologies, jobs of several processes, signals."""
