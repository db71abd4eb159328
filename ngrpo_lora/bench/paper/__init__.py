"""The paper's comparison, run on this machine: `ngrpo bench paper`.

methods -> plan (equal compute) -> search (learning rate and clip) -> runs -> outcomes -> tables, figures, one page

Every training run is an ordinary `ngrpo train` in a process and a folder of its own, so that whatever ends the command
loses nothing: the same command goes on.
"""
