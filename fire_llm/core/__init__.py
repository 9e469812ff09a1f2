"""What every part stands on: errors, files that appear whole, locks, signals, the machine, the installed libraries."""
