"""Which layout a run should have on so many GPUs: what each costs in memory and time, from a written roofline.

Nothing here runs the model. `docs/plan.md` has every formula, what it assumes, and how it was checked.
"""
