"""The settings of every algorithm, one file each, apart from the algorithms so that they are checked without torch."""
