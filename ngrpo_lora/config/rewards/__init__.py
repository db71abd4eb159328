"""The settings of rewards whose own files load torch, apart from them so that they are checked without torch."""
