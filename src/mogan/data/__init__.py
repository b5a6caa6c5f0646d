"""Videos and prompts that people have, and the cache of them that training reads."""
