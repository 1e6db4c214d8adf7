"""Sources, tasks and the prepare stage: raw files to queries, corpus and qrels."""
