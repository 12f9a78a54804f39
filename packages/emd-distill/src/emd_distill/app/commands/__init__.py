"""The commands of the console script, by what they are for."""
