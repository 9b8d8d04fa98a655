"""The stock configs of the installed libraries, and what Pro-tuning makes of each."""
