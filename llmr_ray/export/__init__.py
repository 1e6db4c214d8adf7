"""What a run made, in the formats of other projects."""
