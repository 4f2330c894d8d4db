"""The version of the distribution `vjepa-pretrain`."""

__version__ = "0.1.0"
