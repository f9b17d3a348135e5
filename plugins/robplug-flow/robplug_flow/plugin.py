"""What robplug-flow offers to the host."""
