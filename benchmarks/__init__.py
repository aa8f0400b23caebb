"""What is measured. A regular package: on another machine one of this name may be installed, and would go first."""
