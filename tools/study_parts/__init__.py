"""Parts of tools/study.py: the plan, one run, and what is drawn from the results."""
