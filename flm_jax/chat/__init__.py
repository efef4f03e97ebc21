"""Conversations: reading them from files, templates that write them as tokens, packing them into training rows."""
