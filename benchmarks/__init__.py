"""What was measured, and how: each module is a command of its own, and RESULTS.md has the tables."""
