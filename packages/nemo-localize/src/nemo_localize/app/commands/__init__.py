"""The commands, by what they are for. Each parses, calls one function, and writes a run; heavy imports stand inside."""
