"""What the package writes and reads: folders of generators."""
