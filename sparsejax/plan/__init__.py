"""Floor 7: the dry run. What a config costs and where its arrays lie, from shapes alone; nothing is allocated."""
