"""What is counted over the test questions, exact over ranks with uneven data."""
