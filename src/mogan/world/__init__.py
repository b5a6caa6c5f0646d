"""The world of the laboratory: scenes, how they are drawn, and instruments that know its laws."""
