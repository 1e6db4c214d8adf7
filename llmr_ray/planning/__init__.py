"""What a configuration will take, from the configuration alone: FLOPs, hours, memory and storage of each stage."""
