"""What a stage is made of: locks, inputs, outputs, unfinished work and manifest. `lib.artifacts.Stage` combines them."""
