"""What robplug-dag offers to the host."""
