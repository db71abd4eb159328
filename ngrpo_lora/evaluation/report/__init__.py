"""The report of a run: `report.html`, one page that loads nothing else, made from what the run has left so far.

`record` reads a run's folder, `sections` and `comparison` turn it into HTML with the curves of `charts` and the
warnings of `health`, `page` writes the file, `watching` does so while the run goes, and `guard` warns on the screen.
"""
