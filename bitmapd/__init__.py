"""bitmapd: the mirroring appliance (record, predictor, gate, copier, NBD export)."""

__version__ = "0.1.0"
