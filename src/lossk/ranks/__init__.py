"""The processes of one run: who is there, what they tell one another, how work is dealt."""
