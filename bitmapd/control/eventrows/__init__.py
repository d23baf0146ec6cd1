"""The rows of the catalogue of events, by what they are about (pure)."""
