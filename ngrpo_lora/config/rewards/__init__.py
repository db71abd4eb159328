"""The settings of rewards that run a network here, apart from them so that they are checked without torch."""
