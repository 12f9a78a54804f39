"""immiscible."""
