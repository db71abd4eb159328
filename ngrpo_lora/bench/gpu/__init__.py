"""What a GPU does with this trainer: `ngrpo bench report`, part by part within a budget of minutes.

`parts` says what is measured, `measuring` measures a row of it, `__main__` the rows of a part in a process of its own,
`running` starts these processes, and `report` makes tables of what they have found. A CPU measures the same parts on
the embedded model.
"""
