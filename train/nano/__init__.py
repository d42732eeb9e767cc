"""Everything that makes the bundled nano model: its pictures, its questions, its shards and its stages."""
