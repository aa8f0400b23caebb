"""What the project is made with. A regular package, as `benchmarks` is."""
