"""People teach a run their taste: a page with the pictures of one prompt, what they say of them, and what follows.

`Voting` opens the page, waits for votes and gives scores; the reward `vote` trains on them. `README.md` says how.
"""
