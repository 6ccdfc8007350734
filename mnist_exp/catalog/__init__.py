"""All runs on record: listed, compared, stopped, removed, exported."""
