"""What `forge doctor` looks at, and what `forge debug-bundle` gathers."""
