"""What several test modules share. Each module here is about one thing."""
