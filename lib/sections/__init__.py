"""The sections of the config: every knob's name, type and limits. How files are merged into one is `lib.config`'s."""
