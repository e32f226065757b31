"""Drawing of text in pictures: captions, and the fonts of the system."""
