"""The version, in the one place where packaging and the commands read it; importing this needs nothing else."""

__version__ = "0.1.0"
