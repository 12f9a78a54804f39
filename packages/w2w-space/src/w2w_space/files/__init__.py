"""The files of w2w-space: populations, spaces, points, adapters that other tools read, and the authors' own files."""
