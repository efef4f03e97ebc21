"""Conversations: read from files, written as tokens by templates, packed into windows, held in a terminal."""
