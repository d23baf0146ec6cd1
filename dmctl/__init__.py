"""dmctl: the control plane of bitmapd volumes."""
