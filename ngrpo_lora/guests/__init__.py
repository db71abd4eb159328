"""Code of the user's that is called here: its files, and how what it changes of the process is kept to itself."""
