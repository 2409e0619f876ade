"""Where documents come from, and what is one."""
