"""What is right, computed slowly and by other means, and every pair of features against it."""
