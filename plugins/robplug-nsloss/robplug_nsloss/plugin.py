"""What robplug-nsloss offers to the host."""
